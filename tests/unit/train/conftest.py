"""A tiny data set and model on disk, once for all tests of a process; torch's settings end with each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from llava_core.testing.datasets import TinyParts, tiny_parts
from tests.hardware import torch_settings_kept


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> TinyParts:
    """36 rows: four steps of 8 and one of 4 are an epoch."""
    return tiny_parts(tmp_path_factory.mktemp("parts"), num_rows=36)


@pytest.fixture(autouse=True)
def torch_settings() -> Iterator[None]:
    with torch_settings_kept():
        yield
