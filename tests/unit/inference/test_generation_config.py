"""The end tokens of a folder's `generation_config.json`."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_core.errors import WeightsError
from llava_core.inference.assistant import _generation_eos


@pytest.mark.parametrize("text", ["{", "[1]", '{"eos_token_id": "2"}', '{"eos_token_id": [2, null]}'])
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(WeightsError, match=r"generation_config\.json"):
        _generation_eos(tmp_path)


@pytest.mark.parametrize(
    ("text", "ids"), [("{}", []), ('{"eos_token_id": 2}', [2]), ('{"eos_token_id": [2, 7]}', [2, 7])]
)
def test_the_ids_are_read(tmp_path: Path, text: str, ids: list[int]) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    assert _generation_eos(tmp_path) == ids
