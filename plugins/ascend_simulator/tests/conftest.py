"""These tests run inside `ascend-sim run`; elsewhere those that need torch_npu are skipped before they import it."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

# Read when torch is imported: two threads each on busy cores are far slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

INSTALLED = importlib.util.find_spec("ascend_simulator") is not None
READY = INSTALLED and "ASCEND_SIMULATOR" in os.environ and importlib.util.find_spec("torch_npu") is not None
# These need no torch_npu in their own process.
ANYWHERE = ("test_command.py",)


class SkippedModule(pytest.Module):
    """A test file that is not imported, because importing torch would fail."""

    def collect(self) -> list[pytest.Item]:
        pytest.skip("needs torch_npu on the simulator; see plugins/ascend_simulator/README.md")


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if READY or (INSTALLED and module_path.name in ANYWHERE):
        return None
    return SkippedModule.from_parent(parent, path=module_path)


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers for each test."""
    if READY:
        import torch

        torch.manual_seed(0)
