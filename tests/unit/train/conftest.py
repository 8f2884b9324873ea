"""A tiny data set and model on disk, once for all tests of a process; torch's settings end with each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from llava_core.testing.datasets import TinyParts, tiny_parts


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> TinyParts:
    """36 rows: four steps of 8 and one of 4 are an epoch."""
    return tiny_parts(tmp_path_factory.mktemp("parts"), num_rows=36)


@pytest.fixture(autouse=True)
def torch_settings() -> Iterator[None]:
    """A run sets these for its process."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
