"""The recipes hold LLaVA-1.5's hyper-parameters: scripts/v1_5/pretrain.sh and finetune.sh of the original."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_core.config import RunConfig, load_config, to_yaml
from llava_core.errors import ConfigError
from llava_core.train.prepare import check_paths

GIVEN = {
    "llava15-7b-pretrain": ["model.vision=clip", "model.language=vicuna", "data.path=d.json", "data.images=i"],
    "llava15-7b-sft": ["model.path=stage1", "data.path=d.json", "data.images=i"],
}


def recipe(name: str) -> RunConfig:
    return load_config(name, GIVEN[name])


@pytest.mark.parametrize("name", [*GIVEN])
def test_what_both_stages_share(name: str) -> None:
    config = recipe(name)
    optimizer, train = config.optimizer, config.train
    assert (optimizer.schedule, optimizer.warmup_fraction, optimizer.final_fraction) == ("cosine", 0.03, 0.0)
    assert (optimizer.betas, optimizer.eps, optimizer.weight_decay, optimizer.clip_norm) == ((0.9, 0.999), 1e-8, 0, 1)
    assert (train.epochs, train.max_steps, train.precision, config.data.max_length) == (1, None, "bf16", 2048)


def test_stage_1_trains_the_projector_on_captions() -> None:
    config = recipe("llava15-7b-pretrain")
    assert (config.optimizer.learning_rate, config.batch.global_size) == (1e-3, 256)
    assert config.train.trainable == ("projector",)
    assert (config.data.template, config.data.image_aspect, config.data.order) == ("plain", "square", "shuffled")
    assert (config.model.projector_type, config.model.vision_feature_layer) == ("mlp2x_gelu", -2)
    assert config.model.vision_feature_select == "default"


def test_stage_2_trains_projector_and_language_model_on_instructions() -> None:
    config = recipe("llava15-7b-sft")
    assert (config.optimizer.learning_rate, config.batch.global_size) == (2e-5, 128)
    assert set(config.train.trainable) == {"projector", "language"}
    assert (config.data.template, config.data.image_aspect, config.data.order) == ("v1", "pad", "modality_length")


@pytest.mark.parametrize("name", [*GIVEN])
def test_a_recipe_says_what_it_still_needs(name: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.path: not set.*pass data\.path=…"):
        load_config(name)
    with pytest.raises(ConfigError, match="set path"):
        load_config(name, ["data.path=d.json"])


@pytest.mark.parametrize("name", [*GIVEN])
def test_a_recipe_written_as_yaml_reads_back_equal(name: str, tmp_path: Path) -> None:
    (tmp_path / "again.yaml").write_text(to_yaml(recipe(name)))
    assert load_config(str(tmp_path / "again.yaml")) == recipe(name)


def test_paths_that_are_not_there_are_all_listed() -> None:
    with pytest.raises(ConfigError) as raised:
        check_paths(recipe("llava15-7b-pretrain"))
    for key in ("model.vision = clip", "model.language = vicuna", "data.path = d.json", "data.images = i"):
        assert key in str(raised.value)
