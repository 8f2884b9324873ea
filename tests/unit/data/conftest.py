"""A tiny data set and model on disk, once for all tests of a process."""

from __future__ import annotations

import pytest

from llava_core.testing.datasets import TinyParts, tiny_parts


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> TinyParts:
    """36 rows, every fifth without an image."""
    return tiny_parts(tmp_path_factory.mktemp("parts"), num_rows=36)
