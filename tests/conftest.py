"""What holds for every test: one thread, no network, the same random numbers."""

from __future__ import annotations

import ipaddress
import os
import random
import socket
from typing import Any

# Libraries read these when they are imported, so they are set before any of them is.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    WANDB_MODE="offline",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    MPLBACKEND="Agg",
)

import numpy as np
import pytest
import torch
from hypothesis import settings

from llava_core.engine.hardware import HOST, choose_backend
from llava_core.errors import LlavaError
from llava_core.plugins import Registry
from tests.hardware import VARIABLE

SEED = 0

settings.register_profile("llava", derandomize=True, deadline=None)
settings.load_profile("llava")


class NetworkBlocked(RuntimeError):
    """A test tried to leave the machine. Not an OSError, which a library would take for a bad line and try again."""


def _is_loopback(host: str) -> bool:
    if host in ("", "localhost"):
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _refuse_non_loopback(sock: socket.socket, address: Any) -> None:
    if sock.family in (socket.AF_INET, socket.AF_INET6) and not _is_loopback(address[0]):
        raise NetworkBlocked(
            f"tests run without a network, and this one connects to {address!r}; use a local file or stub"
        )


def pytest_addoption(parser: pytest.Parser) -> None:
    help_text = "run the tests marked `device`, and those marked with the backend's own name, on this backend alone"
    parser.addoption("--backend", default=HOST, metavar="NAME", help=f"{help_text}; without it, all tests run")


def pytest_configure(config: pytest.Config) -> None:
    choose_hardware(config.getoption("--backend"))
    # Two threads each on busy cores are far slower than one, and the order of sums changes with their number.
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    block_network(patch)


def choose_hardware(name: str) -> None:
    """Make it the backend under test."""
    if name != HOST:
        try:
            choose_backend(name, Registry.discover())
        except LlavaError as error:
            raise pytest.UsageError(f"--backend {name}: {error}") from error
    os.environ[VARIABLE] = name


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `--backend` only what runs on that: no other test may seem to have run there."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))
    name = config.getoption("--backend")
    if name == HOST:
        return
    here = [item for item in items if item.get_closest_marker("device") or item.get_closest_marker(name)]
    config.hook.pytest_deselected(items=list(set(items) - set(here)))
    items[:] = here


def block_network(patch: pytest.MonkeyPatch) -> None:
    """Lets sockets of this process connect to loopback addresses and Unix sockets only."""
    connect, connect_ex = socket.socket.connect, socket.socket.connect_ex

    def guarded_connect(self: socket.socket, address: Any) -> None:
        _refuse_non_loopback(self, address)
        connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        _refuse_non_loopback(self, address)
        return connect_ex(self, address)

    patch.setattr(socket.socket, "connect", guarded_connect)
    patch.setattr(socket.socket, "connect_ex", guarded_connect_ex)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds Python, numpy and torch before each test; the value, for tests that build generators of their own."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    return SEED
