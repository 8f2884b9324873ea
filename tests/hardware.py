"""The hardware that tests marked `device` run on: that of pytest's option `--backend`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from llava_core.backend import World
from llava_core.engine.hardware import HOST, Hardware, load_backend, open_hardware
from llava_core.plugins import Registry

VARIABLE = "LLAVA_CORE_TEST_BACKEND"
"""The option's value, for support modules that no fixture reaches and for processes that tests start."""


def backend_name() -> str:
    """The backend under test."""
    return os.environ.get(VARIABLE, HOST)


@cache
def hardware() -> Hardware:
    """The backend under test with its first device opened, once in a process.

    Many tests compare bits. On the host equal calls give equal bits as they are; a device is asked for it.
    """
    name, registry = backend_name(), Registry.discover()
    # What a launcher sets, before the device is opened: some of it must be there for bits to repeat.
    os.environ.update(load_backend(name, registry).launch_env(World(1), os.environ))
    return open_hardware(name, registry, threads=1, deterministic=name != HOST)


@contextmanager
def torch_settings_kept() -> Iterator[None]:
    """Puts back what a run sets for its process."""
    hardware()  # so that what opening it sets is kept, too
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
