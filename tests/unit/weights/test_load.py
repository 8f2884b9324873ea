"""Folders to models: what loads, what is refused and in which words, and what happens to memory and files."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig

from llava_core.backend import OpSet
from llava_core.errors import LlavaError, WeightsError
from llava_core.model.llava import Llava
from llava_core.model.spec import RopeSpec
from llava_core.testing.models import (
    classic_tensors,
    save_folder,
    tiny_llava_config,
    tiny_model,
    tiny_text_config,
    tiny_vision_config,
)
from llava_core.weights.hf_config import model_spec, read_config
from llava_core.weights.load import load_model
from llava_core.weights.source import ModelSource, compose, from_folder
from tests.hardware import hardware

WEIGHTS = "model.safetensors"


def load(source: ModelSource, *, trainable=(), dtype=torch.float32, seed=0) -> Llava:
    """The model on the device under test."""
    return load_model(
        source,
        OpSet.of({}),
        compute_dtype=dtype,
        device=hardware().device,
        trainable=frozenset(trainable),
        seed=seed,
    )


def rewrite(folder: Path, change) -> None:
    """Apply `change` to the folder's tensors."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / WEIGHTS)


def edit_config(folder: Path, **changes: Any) -> None:
    """Set keys of `config.json`; `text_config` and `vision_config` are merged."""
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        config[key] = config[key] | value if isinstance(config.get(key), dict) else value
    (folder / "config.json").write_text(json.dumps(config))


def assert_holds(model: Llava, hf, prefix: str = "") -> None:
    """Each parameter of `hf` under its name on the hub, bit for bit."""
    parameters = dict(model.named_parameters())
    for name, tensor in classic_tensors(hf).items():
        assert parameters[prefix + name].device == hardware().device, name
        assert torch.equal(parameters[prefix + name].cpu(), tensor), name


@pytest.fixture(scope="module")
def hf():
    return tiny_model(tiny_llava_config(), seed=1)


@pytest.fixture
def folder(hf, tmp_path) -> Path:
    return save_folder(hf, tmp_path / "llava")


@pytest.fixture
def parts(tmp_path) -> dict[str, Any]:
    """Arguments of `compose`: a CLIP, a Llama, no projector."""
    return {
        "vision": save_folder(tiny_model(tiny_vision_config(), seed=2), tmp_path / "vision"),
        "language": save_folder(tiny_model(tiny_text_config(), seed=3), tmp_path / "language"),
        "projector": None,
        "projector_type": "mlp2x_gelu",
        "feature_layer": -2,
        "feature_select": "default",
    }


# ---- what loads


@pytest.mark.device
@pytest.mark.parametrize("layout", ["classic", "current"])
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_whole_llava(tmp_path, layout, family):
    select = {"clip": "default", "siglip": "full"}[family]
    vision = tiny_vision_config(family, **({"vision_use_head": False} if family == "siglip" else {}))
    hf = tiny_model(tiny_llava_config(vision=vision, vision_feature_select_strategy=select))
    source = from_folder(save_folder(hf, tmp_path / "llava", layout=layout))
    assert_holds(load(source), hf)
    assert source.tokenizer_folder == source.processor_folder == tmp_path / "llava"
    assert source.files == (tmp_path / "llava" / WEIGHTS,)


@pytest.mark.device
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_language_model_alone(tmp_path, family):
    hf = tiny_model(tiny_text_config(family))
    source = from_folder(save_folder(hf, tmp_path / "lm"))
    model = load(source)
    assert_holds(model, hf, "language_model.")
    assert not hasattr(model, "vision_tower")
    assert source.processor_folder is None


def test_shards(hf, tmp_path):
    hf.save_pretrained(tmp_path, max_shard_size="100KB")
    source = from_folder(tmp_path)
    assert len(source.files) > 1
    assert_holds(load(source), hf)


def test_constants_of_older_releases_are_left_out(hf, folder):
    def add(tensors):
        tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(10)
        tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    rewrite(folder, add)
    assert_holds(load(from_folder(folder)), hf)


def test_siglips_pooling_head_is_left_out(tmp_path):
    config = tiny_llava_config(vision=tiny_vision_config("siglip"), vision_feature_select_strategy="full")
    folder = save_folder(tiny_model(config), tmp_path)
    assert any(".head." in name for name in load_file(folder / WEIGHTS))
    assert not any(".head." in name for name, _ in load(from_folder(folder)).named_parameters())


@pytest.mark.device
@pytest.mark.parametrize("name", ["language_model.lm_head.weight", "lm_head.weight"])
def test_a_tied_head_written_twice(tmp_path, name):
    hf = tiny_model(tiny_llava_config(tiny_text_config(tie_word_embeddings=True), tie_word_embeddings=True))
    folder = save_folder(hf, tmp_path)
    rewrite(folder, lambda tensors: tensors.update({name: hf.lm_head.weight.detach().clone()}))
    model = load(from_folder(folder))
    assert_holds(model, hf)
    assert model.language_model.head_weight is model.language_model.model.embed_tokens.weight


# ---- composed models


@pytest.mark.parametrize("layout", ["classic", "current"])
def test_compose_takes_each_part_from_its_folder(parts, tmp_path, layout):
    vision, language = tiny_model(tiny_vision_config(), seed=2), tiny_model(tiny_text_config(), seed=3)
    parts["vision"] = save_folder(vision, tmp_path / "v", layout=layout)
    parts["language"] = save_folder(language, tmp_path / "l", layout=layout)
    source = compose(**parts)
    model = load(source)
    assert_holds(model, vision, "vision_tower.")
    assert_holds(model, language, "language_model.")
    assert (source.tokenizer_folder, source.processor_folder) == (tmp_path / "l", tmp_path / "v")


def test_compose_takes_the_vision_half_of_a_whole_clip(parts, tmp_path):
    text = CLIPTextConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    clip = CLIPModel(CLIPConfig(vision_config=tiny_vision_config().to_dict(), text_config=text.to_dict()))
    clip.save_pretrained(tmp_path / "clip")
    parameters = dict(load(compose(**{**parts, "vision": tmp_path / "clip"})).named_parameters())
    for name, tensor in clip.vision_model.named_parameters():
        assert torch.equal(parameters[f"vision_tower.vision_model.{name}"], tensor), name


def projector_weights(model: Llava) -> list[torch.Tensor]:
    return [p.detach().cpu() for p in model.multi_modal_projector.parameters()]


@pytest.mark.device
def test_a_fresh_projector_follows_its_seed(parts):
    first, again, other = (projector_weights(load(compose(**parts), seed=seed)) for seed in (7, 7, 8))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.device
def test_a_fresh_projector_leaves_the_global_generator_alone(parts):
    state = torch.get_rng_state()
    load(compose(**parts))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("projector_type", ["linear", "mlp2x_gelu", "mlp3x_gelu"])
def test_a_fresh_projector_is_initialised_as_torchs_linear_layers(parts, projector_type):
    """Uniform within 1/sqrt(inputs): the bound is kept and nearly reached."""
    model = load(compose(**{**parts, "projector_type": projector_type}))
    for layer in model.multi_modal_projector.children():
        bound = layer.in_features**-0.5
        assert 0.9 * bound < layer.weight.abs().max() <= bound
        assert 0.5 * bound < layer.bias.abs().max() <= bound


def test_projector_of_a_whole_llava(parts, folder, hf):
    model = load(compose(**{**parts, "projector": folder}))
    expected = hf.model.multi_modal_projector.parameters()
    assert all(torch.equal(a, b) for a, b in zip(projector_weights(model), expected, strict=True))


@pytest.mark.parametrize("prefix", ["model.mm_projector.", "mm_projector."])
def test_projector_of_the_original_llava(parts, tmp_path, hf, prefix):
    projector = hf.model.multi_modal_projector
    layers = {"0": projector.linear_1, "2": projector.linear_2}
    state = {f"{prefix}{i}.{kind}": getattr(layers[i], kind).detach() for i in layers for kind in ("weight", "bias")}
    torch.save(state, tmp_path / "mm_projector.bin")
    model = load(compose(**{**parts, "projector": tmp_path / "mm_projector.bin"}))
    assert all(torch.equal(a, b) for a, b in zip(projector_weights(model), projector.parameters(), strict=True))


def test_a_projector_of_another_type_is_refused(parts, folder):
    with pytest.raises(WeightsError, match=r"unexpected \(2\): multi_modal_projector\.linear_2\.bias"):
        load(compose(**{**parts, "projector": folder, "projector_type": "linear"}))


def test_half_a_projector_is_refused(parts, tmp_path, hf):
    torch.save({"mm_projector.0.weight": hf.model.multi_modal_projector.linear_1.weight.detach()}, tmp_path / "p.bin")
    with pytest.raises(WeightsError, match=r"missing \(3\): .*linear_1\.bias, .*linear_2\.bias, .*linear_2\.weight"):
        load(compose(**{**parts, "projector": tmp_path / "p.bin"}))


# ---- weights that do not fit


def test_every_missing_and_unexpected_name_is_listed(folder):
    def change(tensors):
        tensors["language_model.model.norm.extra"] = tensors.pop("language_model.model.norm.weight")
        tensors["image_new_line"] = torch.zeros(64)
        del tensors["vision_tower.vision_model.embeddings.class_embedding"]

    rewrite(folder, change)
    with pytest.raises(WeightsError) as error:
        load(from_folder(folder))
    assert str(error.value).splitlines()[1:] == [
        "  missing (2): language_model.model.norm.weight, vision_tower.vision_model.embeddings.class_embedding",
        "  unexpected (2): image_new_line, language_model.model.norm.extra",
    ]


def test_wrong_shape_names_both(folder):
    name = "multi_modal_projector.linear_1.weight"
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(64, 33)}))
    with pytest.raises(WeightsError, match=rf"{name}: the file has \(64, 33\), the config \(64, 32\)"):
        load(from_folder(folder))


def test_two_spellings_of_one_parameter(folder):
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(96, 64)}))
    with pytest.raises(WeightsError, match=r"'lm_head\.weight' and .* are both 'language_model\.lm_head\.weight'"):
        from_folder(folder)


def test_folder_without_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"has no config\.json: it is not a Hugging Face model folder"):
        from_folder(folder)


# ---- memory and files


def mapped_file(tensor: torch.Tensor) -> str | None:
    """The file that backs the tensor's memory, from Linux's /proc."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, inode, *path = line.split(maxsplit=5)
        start, end = (int(edge, 16) for edge in span.split("-"))
        if start <= tensor.data_ptr() < end:
            return path[0] if path and inode != "0" else None
    return None


@pytest.mark.device
def test_trainable_parts_are_fp32_copies_and_frozen_ones_in_the_compute_dtype(hf, tmp_path):
    folder = save_folder(hf, tmp_path, dtype=torch.bfloat16)
    model = load(from_folder(folder), trainable={"projector"}, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        trained = name.startswith("multi_modal_projector.")
        assert parameter.requires_grad == trained, name
        assert parameter.dtype == (torch.float32 if trained else torch.bfloat16), name


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_tensors_stay_mapped(hf, tmp_path, dtype):
    folder = save_folder(hf, tmp_path, dtype=dtype)
    model = load(from_folder(folder), trainable={"projector"}, dtype=dtype)
    assert mapped_file(model.language_model.model.embed_tokens.weight) == str(folder / WEIGHTS)
    assert mapped_file(model.vision_tower.vision_model.post_layernorm.bias) == str(folder / WEIGHTS)
    assert all(mapped_file(p) is None for p in model.multi_modal_projector.parameters())


@pytest.mark.device
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_training_never_writes_to_the_file(hf, folder, suffix):
    file = folder / WEIGHTS
    if suffix == "bin":
        torch.save(load_file(file), folder / "pytorch_model.bin")
        file.unlink()
        file = folder / "pytorch_model.bin"
    digest = hashlib.sha256(file.read_bytes()).digest()
    model = load(from_folder(folder), trainable={"vision", "projector", "language"})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert hashlib.sha256(file.read_bytes()).digest() == digest
    assert_holds(load(from_folder(folder)), hf)


# ---- configs


REFUSED = [
    ({"text_config": {"attention_bias": True}}, r"attention_bias = True is not implemented; expected False"),
    ({"text_config": {"mlp_bias": True}}, r"mlp_bias = True is not implemented; expected False"),
    ({"text_config": {"hidden_act": "gelu"}}, r"hidden_act = 'gelu' is not implemented; expected 'silu'"),
    ({"text_config": {"model_type": "gpt2"}}, r"language model 'gpt2'; expected llama, mistral or internlm2"),
    (
        {"text_config": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}},
        r"rope_type 'yarn' is not implemented; expected default, linear, dynamic or llama3",
    ),
    ({"vision_config": {"hidden_act": "relu"}}, r"hidden_act = 'relu'; expected one of \['gelu', "),
    ({"vision_config": {"num_channels": 1}}, r"num_channels = 1 is not implemented; expected 3"),
    ({"vision_config": {"model_type": "vit"}}, r"vision tower 'vit'; expected one of \['clip_vision_model', 'siglip"),
    ({"vision_config": {"model_type": "siglip_vision_model"}}, r"default drops the class token, and SigLIP has none"),
    ({"vision_feature_layer": [-2, -1]}, r"vision_feature_layer = \[-2, -1\]: features of several layers are not"),
    ({"vision_feature_layer": 9}, r"vision_feature_layer = 9: the tower has 4 layers; choose from -5 to 4"),
    ({"projector_hidden_act": "relu"}, r"projector_hidden_act = 'relu'"),
    ({"multimodal_projector_bias": False}, r"multimodal_projector_bias = False is not implemented; expected True"),
    ({"model_type": "qwen2"}, r"language model 'qwen2'; expected llama, mistral or internlm2"),
    ({"model_type": "no_such_model"}, r"config\.json cannot be read: .*no_such_model"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[str(row[0]) for row in REFUSED])
def test_what_is_not_implemented_is_refused_by_name(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(LlavaError, match=message):
        from_folder(folder)


def test_rope_as_older_releases_spell_it(tmp_path):
    folder = save_folder(tiny_model(tiny_text_config()), tmp_path)
    scaling = {"type": "linear", "factor": 2.0}
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 5e5, "rope_scaling": scaling}))
    assert model_spec(read_config(folder), folder).text.rope == RopeSpec(5e5, "linear", factor=2.0)


def test_llama3_rope_without_an_original_length_takes_the_configs(tmp_path):
    """As transformers does."""
    parameters = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = tiny_text_config(rope_parameters={**parameters, "rope_theta": 1e4}, max_position_embeddings=64)
    config.save_pretrained(tmp_path)
    assert model_spec(read_config(tmp_path), tmp_path).text.rope.original_max_positions == 64
