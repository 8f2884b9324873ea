"""The recipes hold the hyper-parameters of their sources: scripts/v1_5/pretrain.sh and finetune.sh of LLaVA-1.5,
llava_internlm2_chat_20b_clip_vit_large_p14_336_e1_gpu8_pretrain.py of XTuner, Pai-Megatron-Patch's examples, NeMo's
neva_finetune.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_core.config import RunConfig, load_config, recipe_names, to_yaml
from llava_core.errors import ConfigError
from llava_core.train.prepare import check_paths

LLAVA15 = {
    "llava15-7b-pretrain": ["model.vision=clip", "model.language=vicuna", "data.path=d.json", "data.images=i"],
    "llava15-7b-sft": ["model.path=stage1", "data.path=d.json", "data.images=i"],
}
GIVEN = {
    **LLAVA15,
    "llava-internlm2-20b-pretrain": ["model.vision=c", "model.language=l", "data.path=d.json", "data.images=i"],
    "llava-internlm2-20b-sft-lora": ["model.path=stage1", "data.path=d.json", "data.images=i"],
    "llava-mistral-7b-pretrain": ["model.vision=c", "model.language=l", "data.path=d.json", "data.images=i"],
    "neva-7b-pretrain": ["model.vision=c", "model.language=l", "data.path=d.json", "data.images=i"],
    "neva-7b-sft": ["model.path=stage1", "data.path=d.json", "data.images=i"],
    "llama31-8b-sft": ["model.path=llama", "data.path=d.json"],
    "llama31-8b-pretrain": ["model.path=llama", "data.path=corpus.idx"],
}


def recipe(name: str) -> RunConfig:
    return load_config(name, GIVEN[name])


def test_each_recipe_is_tested_here() -> None:
    assert recipe_names() == sorted(GIVEN)


@pytest.mark.parametrize("name", [*LLAVA15])
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


def test_internlm2_20b_with_adapters() -> None:
    """llava_internlm2_chat_20b_qlora_clip_vit_large_p14_336_lora_e1_gpu8_finetune.py."""
    config, first = recipe("llava-internlm2-20b-sft-lora"), recipe("llava-internlm2-20b-pretrain")
    assert config.lora is not None
    assert {part: (given.rank, given.alpha) for part, given in config.lora.parts.items()} == {
        "language": (512, 256),
        "vision": (64, 16),
    }
    assert (config.lora.dropout, config.lora.dora) == (0.05, False)
    assert set(config.train.trainable) == {"vision", "projector", "language"}
    assert config.optimizer == first.optimizer.model_copy(update={"learning_rate": 2e-4})
    assert (config.batch.global_size, config.train.epochs) == (8 * 2 * 8, 1)
    data = config.data
    assert (data.template, data.image_aspect, data.order) == ("internlm2", "pad", "length_grouped")
    assert data.max_length == first.data.max_length


def test_internlm2_20b() -> None:
    config = recipe("llava-internlm2-20b-pretrain")
    optimizer, data = config.optimizer, config.data
    assert (optimizer.learning_rate, optimizer.betas) == (1e-3, (0.9, 0.999))
    assert (optimizer.weight_decay, optimizer.clip_norm) == (0, 1)
    assert (optimizer.schedule, optimizer.warmup_fraction, optimizer.final_fraction) == ("cosine", 0.03, 0)
    assert (config.train.trainable, config.train.epochs, config.batch.global_size) == (("projector",), 1, 32 * 8)
    text_length = 2048 - (336 // 14) ** 2
    assert data.max_length == text_length - 1 + (336 // 14) ** 2  # one of XTuner's text tokens stands for the image
    assert (data.template, data.image_aspect, data.order) == ("internlm2", "square", "shuffled")
    assert (config.checkpoint.every_steps, config.checkpoint.keep, config.parallel.data) == (500, 2, "full")


@pytest.mark.parametrize("name", ["llama31-8b-pretrain", "llama31-8b-sft"])
def test_what_both_of_llama31_8b_share(name: str) -> None:
    config = recipe(name)
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.betas, optimizer.weight_decay) == (1e-5, (0.9, 0.95), 0.1)
    assert optimizer.final_fraction * optimizer.learning_rate == pytest.approx(1e-6)
    assert (config.batch.global_size, config.data.max_length) == (8, 128)
    assert (config.train.trainable, config.data.images) == (("language",), None)
    assert (config.parallel.tensor, config.parallel.pipeline) == (4, 2)


def test_llama31_8b_counts_tokens_on_documents_and_steps_on_instructions() -> None:
    documents, instructions = recipe("llama31-8b-pretrain"), recipe("llama31-8b-sft")
    assert (documents.optimizer.warmup_tokens, documents.train.max_tokens) == (100, 10000)
    assert (documents.train.loss, documents.data.overlong) == ("token_mean", "split")
    assert (instructions.optimizer.warmup_steps, instructions.train.max_steps) == (100, 10000)
    assert instructions.train.loss == "sequence_mean"


def test_llava_mistral_7b() -> None:
    config = recipe("llava-mistral-7b-pretrain")
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.betas, optimizer.weight_decay) == (1.5e-4, (0.9, 0.95), 0.01)
    assert optimizer.final_fraction * optimizer.learning_rate == pytest.approx(1e-5)
    assert (optimizer.warmup_steps, config.train.max_steps, config.batch.global_size) == (200, 20000, 256)
    assert (config.data.max_length, config.train.trainable) == (576 + 1024, ("projector",))
    assert (config.parallel.tensor, config.parallel.pipeline) == (4, 1)


def test_neva_7b() -> None:
    pretrain, sft = recipe("neva-7b-pretrain"), recipe("neva-7b-sft")
    for config in (pretrain, sft):
        optimizer = config.optimizer
        assert (optimizer.betas, optimizer.weight_decay, optimizer.clip_norm) == ((0.9, 0.999), 0, 1)
        assert (optimizer.schedule, optimizer.final_fraction) == ("cosine", 0)
        assert (config.data.max_length, config.parallel.tensor, config.train.precision) == (4096, 4, "bf16")
    lengths = [(config.train.max_steps, config.optimizer.warmup_steps) for config in (pretrain, sft)]
    assert lengths == [(2176, 65), (5197, 155)]
    assert (pretrain.optimizer.learning_rate, pretrain.batch.global_size) == (1e-3, 256)
    assert (sft.optimizer.learning_rate, sft.batch.global_size) == (2e-5, 128)
    assert (pretrain.data.template, pretrain.data.image_aspect) == ("plain", "square")
    assert (sft.data.template, sft.data.image_aspect, sft.train.recompute) == ("v1", "pad", "full")
    assert (sft.data.order, sft.data.mega_batch_mult) == ("length_grouped", 50)
    assert (pretrain.train.trainable, set(sft.train.trainable)) == (("projector",), {"projector", "language"})


@pytest.mark.parametrize("name", [*GIVEN])
def test_a_recipe_says_what_it_still_needs(name: str) -> None:
    with pytest.raises(ConfigError, match=r"data: set path \(one data set\)"):
        load_config(name)
    with pytest.raises(ConfigError, match=r"model: set path \(a whole model\)"):
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


def test_a_templates_file_is_a_path_too() -> None:
    given = GIVEN["llama31-8b-sft"]
    with pytest.raises(ConfigError, match=r"data\.template = mine\.yaml: no such file or folder"):
        check_paths(load_config("llama31-8b-sft", [*given, "data.template=mine.yaml"]))
    with pytest.raises(ConfigError) as raised:
        check_paths(load_config("llama31-8b-sft", [*given, "data.template=mine"]))
    assert "template" not in str(raised.value)
