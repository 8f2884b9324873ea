"""Configs and tokenizers of folders that cannot be honoured: the file and the key are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_core.errors import WeightsError
from llava_core.testing.models import tiny_llava_config, tiny_text_config
from llava_core.weights.hf_config import model_spec, read_config
from llava_core.weights.tokenizer import load_tokenizer


def refusal(folder: Path, **changes: Any) -> str:
    """What is said of a language model's config with these keys."""
    config = tiny_text_config().to_dict() | changes
    (folder / "config.json").write_text(json.dumps(config))
    return refused(folder)


def refused(folder: Path) -> str:
    with pytest.raises(WeightsError) as raised:
        model_spec(read_config(folder), folder)
    assert str(folder) in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": "64"}, "config.json: hidden_size = '64'; expected a whole number"),
        ({"hidden_size": 65, "head_dim": None}, "hidden_size = 65 is not divisible by num_attention_heads = 4"),
        ({"num_attention_heads": 0}, "config.json: num_attention_heads = 0"),
        ({"num_key_value_heads": 0}, "config.json: num_key_value_heads = 0"),
        ({"num_hidden_layers": True}, "config.json: num_hidden_layers = True"),
        ({"vocab_size": None}, "vocab_size"),
        ({"model_type": [1]}, "config.json cannot be read"),
        ({"attention_dropout": 0.5}, "attention_dropout = 0.5 is not implemented"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not implemented"),
    ],
)
def test_a_text_config_is_refused_by_key(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    assert said in refusal(tmp_path, **changes)


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor = 0.25 is not implemented"),
        ({"partial_rotary_factor": 0}, "partial_rotary_factor = 0 is not implemented"),
        ({"mscale": 0.5}, "mscale = 0.5 of the rope is not implemented"),
        ({"factor": "2"}, "factor = '2' of the rope; expected a number"),
    ],
)
def test_a_rope_is_refused_by_key(tmp_path: Path, rope: dict[str, Any], said: str) -> None:
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    assert said in refusal(tmp_path, rope_parameters=linear | rope)


def test_a_rope_that_turns_everything_is_taken(tmp_path: Path) -> None:
    config = tiny_text_config().to_dict() | {"partial_rotary_factor": 1.0, "attention_dropout": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert model_spec(read_config(tmp_path), tmp_path).text.rope.theta == 1e4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention_dropout": 0.5}, "vision attention_dropout = 0.5 is not implemented"),
        ({"num_attention_heads": 0}, "config.json: vision_config.num_attention_heads = 0"),
        ({"image_size": [24, 24]}, "config.json: vision_config.image_size = [24, 24]"),
    ],
)
def test_a_vision_config_is_refused_by_key(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    config = tiny_llava_config().to_dict()
    config["vision_config"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert said in refused(tmp_path)


@pytest.mark.parametrize("text", ["{}", "[1]", '{"version": "1.0"}'])
def test_a_tokenizer_of_the_wrong_kind_says_what_was_expected(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_text_config().to_dict()))
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(WeightsError, match=r"tokenizer\.json is no tokenizer.* expected an object with `model`"):
        load_tokenizer(tmp_path)
