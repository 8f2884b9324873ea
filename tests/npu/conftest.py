"""Everything here runs on an Ascend NPU, or on the simulator of one, and is skipped where there is neither."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from llava_npu.backend import NpuBackend


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    probe = NpuBackend.probe()
    if not probe.available:
        for item in items:
            if item.get_closest_marker("npu"):
                item.add_marker(pytest.mark.skip(reason=probe.reason))


@pytest.fixture
def backend() -> NpuBackend:
    return NpuBackend()


@pytest.fixture
def device(backend: NpuBackend) -> Iterator[torch.device]:
    """The first NPU, opened."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield backend.open(0, threads=None, deterministic=False)
    torch.use_deterministic_algorithms(deterministic)
