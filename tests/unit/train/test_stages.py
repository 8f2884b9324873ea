"""How a pipeline divides a model's layers, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_core.config import RunConfig, build_config
from llava_core.config.parallel import ParallelConfig
from llava_core.engine.layout import Layout
from llava_core.engine.pipeline import num_micro_batches
from llava_core.errors import ConfigError
from llava_core.model.spec import ModelSpec
from llava_core.testing.models import tiny_llava_config, tiny_text_config, tiny_vision_config
from llava_core.train.stages import balanced, pipeline_stages
from llava_core.weights.hf_config import model_spec


def config(tmp_path: Path, trainable: tuple[str, ...] = ("projector", "language"), **parallel: Any) -> RunConfig:
    return build_config(
        {
            "output": tmp_path / "run",
            "model": {"path": tmp_path},
            "data": {"path": tmp_path, "max_length": 64},
            "batch": {"global_size": 8, "micro_tokens": 128},
            "optimizer": {"learning_rate": 1e-3},
            "train": {"trainable": trainable, "max_steps": 1},
            "parallel": parallel,
        }
    )


def spec(num_layers: int = 8, **changes: Any) -> ModelSpec:
    return model_spec(tiny_llava_config(tiny_text_config(num_hidden_layers=num_layers, **changes)), Path("tiny"))


def layers(stages: Any) -> list[list[int]]:
    return [list(stage.layers) for stage in stages]


def test_the_layers_go_to_the_stages_in_order(tmp_path: Path) -> None:
    stages = pipeline_stages(config(tmp_path, pipeline=2, stage_layers=[3, 5]), spec())
    assert layers(stages) == [[0, 1, 2], [3, 4, 5, 6, 7]]
    assert [(stage.is_first, stage.is_last) for stage in stages] == [(True, False), (False, True)]


def test_without_a_pipeline_there_is_one_stage_of_everything(tmp_path: Path) -> None:
    (stage,) = pipeline_stages(config(tmp_path), spec())
    assert stage.is_first
    assert stage.is_last
    assert list(stage.layers) == list(range(8))


@given(st.integers(1, 8), st.integers(0, 40), st.floats(0, 20), st.floats(0, 20))
def test_no_other_split_has_less_on_its_fullest_stage(stages: int, more: int, before: float, after: float) -> None:
    counts = balanced(stages + more, stages, before, after)
    assert sum(counts) == stages + more
    assert min(counts) >= 1

    def fullest(counts: tuple[int, ...]) -> float:
        around = [before] + [0.0] * (stages - 1)
        around[-1] += after
        return max(count + extra for count, extra in zip(counts, around, strict=True))

    for source in range(stages):  # layers are alike, so a better split would be one layer's move away
        for target in range(stages):
            if counts[source] > 1:
                moved = list(counts)
                moved[source] -= 1
                moved[target] += 1
                assert fullest(tuple(moved)) >= fullest(counts) - 1e-9


def test_a_tower_that_learns_leaves_the_first_stage_fewer_layers(tmp_path: Path) -> None:
    tower = tiny_vision_config(hidden_size=128, intermediate_size=256, num_hidden_layers=8)
    seeing = model_spec(tiny_llava_config(tiny_text_config(num_hidden_layers=24), tower), Path("tiny"))
    frozen, learning = (
        layers(pipeline_stages(config(tmp_path, trainable, pipeline=2), seeing))
        for trainable in (("projector", "language"), ("vision", "projector", "language"))
    )
    assert len(learning[0]) < len(frozen[0])


def test_a_large_vocabulary_leaves_the_last_stage_fewer_layers(tmp_path: Path) -> None:
    text_only = model_spec(tiny_text_config(num_hidden_layers=24, vocab_size=4000), Path("tiny"))
    first, last = layers(pipeline_stages(config(tmp_path, ("language",), pipeline=2), text_only))
    assert len(first) > len(last)


@pytest.mark.parametrize(
    ("parallel", "changes", "said"),
    [
        ({"pipeline": 4, "stages": 12}, {}, "12 stages: the language model has only 8 layers"),
        ({"pipeline": 2, "stage_layers": [4, 5]}, {}, "9 layers, and the language model has 8"),
        ({"pipeline": 2}, {"tie_word_embeddings": True}, "head is its embedding"),
    ],
)
def test_what_a_model_cannot_be_divided_into(
    parallel: dict[str, Any], changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    tied = model_spec(tiny_text_config(num_hidden_layers=8, **changes), Path("tiny"))
    with pytest.raises(ConfigError, match=said):
        pipeline_stages(config(tmp_path, ("language",), **parallel), tied)


@pytest.mark.parametrize(
    ("parallel", "said"),
    [
        ({"stages": 4}, "leave them out, or set pipeline above 1"),
        ({"stage_layers": [4, 4]}, "leave them out, or set pipeline above 1"),
        ({"pipeline": 3, "stages": 4}, "3 processes cannot have equally many each"),
        ({"pipeline": 2, "stage_layers": [8]}, "stage_layers has 1 numbers, for 2 stages"),
    ],
)
def test_settings_that_contradict_each_other(parallel: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        config(tmp_path, **parallel)


def test_a_pipeline_takes_its_processes_first() -> None:
    assert Layout.of(ParallelConfig(pipeline=2, tensor=2), 8) == Layout(pipeline=2, shard=2, tensor=2)
    with pytest.raises(ConfigError, match=r"parallel.pipeline = 4: 6 processes do not divide by it"):
        Layout.of(ParallelConfig(pipeline=4), 6)


@given(st.integers(1, 100), st.integers(2, 16), st.booleans())
def test_a_step_has_a_number_of_micro_batches_that_the_schedule_takes(least: int, size: int, interleaved: bool) -> None:
    number = num_micro_batches(least, size, interleaved=interleaved)
    assert max(least, size) <= number < max(least, size) + size
    if interleaved:  # the rule in the docstring of torch's ScheduleInterleaved1F1B
        assert number % max(1, number // size) == 0
