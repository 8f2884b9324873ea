"""The hardware that tests marked `device` run on: that of pytest's option `--backend`."""

from __future__ import annotations

import os
from functools import cache

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
