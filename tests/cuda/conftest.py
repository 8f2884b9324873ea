"""Everything here runs on an NVIDIA GPU, and is skipped where there is none."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from llava_cuda.backend import WORKSPACE, CudaBackend


@pytest.fixture(scope="session")
def backend() -> CudaBackend:
    probe = CudaBackend.probe()
    if not probe.available:
        pytest.skip(probe.reason)
    # Before CUDA starts, so that the tests of determinism need no process of their own.
    os.environ.setdefault(WORKSPACE, ":4096:8")
    return CudaBackend()


@pytest.fixture
def device(backend: CudaBackend) -> Iterator[torch.device]:
    """The first GPU, opened; what opening it changes in this process is put back."""
    tf32, deterministic = torch.backends.cudnn.allow_tf32, torch.are_deterministic_algorithms_enabled()
    yield backend.open(0, threads=None, deterministic=False)
    torch.backends.cudnn.allow_tf32 = tf32
    torch.use_deterministic_algorithms(deterministic)
