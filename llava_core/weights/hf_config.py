"""Hugging Face configs to specs; `config_files` goes back. What this library does not implement is refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from llava_core.data.image_config import parse_pinpoints
from llava_core.data.tiles import Anyres
from llava_core.errors import ConfigError, WeightsError
from llava_core.model.layers import ACTIVATIONS
from llava_core.model.spec import Family, ModelSpec, RopeSpec, TextSpec, VisionSpec, projector_depth
from llava_core.weights import internlm2

FeatureSelect = Literal["default", "full"]

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "image_size",
    "patch_size",
)
"""Keys that hold a whole number of at least 1, in a config and in the parts of one."""

OWN_PROJECTOR = "llava_core:"
"""In an export's `projector_hidden_act`: a projector that transformers does not have, whose type follows.

transformers has one activation between two linear layers. It refuses a folder with this mark; without it, it would fill
in random weights."""


def read_config(folder: Path) -> PretrainedConfig:
    """The folder's config, with the defaults of its family filled in.

    Raises:
        WeightsError: no readable `config.json`, or a family that transformers does not know.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise WeightsError(f"{folder} has no config.json: it is not a Hugging Face model folder.")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        # Before transformers reads it, which divides by some of them.
        problems = list(_bad_sizes(found))
        if problems:
            raise WeightsError(f"{file}: {'; '.join(problems)}.")
        if isinstance(found, dict) and found.get("model_type") == internlm2.MODEL_TYPE:
            return internlm2.read_config(found, file)
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except WeightsError:
        raise
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, StrictDataclassError) as error:
        raise WeightsError(f"{file} cannot be read: {error}") from error
    assert isinstance(config, PretrainedConfig)
    return config


def model_spec(config: PretrainedConfig, where: Path) -> ModelSpec:
    """The spec of a whole folder: a LLaVA, or a language model."""
    if config.model_type not in ("llava", "llava_next"):
        return ModelSpec(text_spec(config, where))
    projector = "mlp2x_gelu"
    if config.projector_hidden_act.startswith(OWN_PROJECTOR):
        projector = config.projector_hidden_act.removeprefix(OWN_PROJECTOR)
    else:
        _require(where, "projector_hidden_act", config.projector_hidden_act, "gelu")
    _require(where, "multimodal_projector_bias", config.multimodal_projector_bias, True)
    if not isinstance(config.vision_feature_layer, int):
        raise WeightsError(
            f"{where}: vision_feature_layer = {config.vision_feature_layer}: features of several layers are not "
            "implemented; expected one index."
        )
    select: FeatureSelect = config.vision_feature_select_strategy
    return ModelSpec(
        text=text_spec(config.text_config, where, tied=bool(config.tie_word_embeddings)),
        vision=vision_spec(config.vision_config, where, config.vision_feature_layer, select),
        projector=projector,
        image_token_id=config.image_token_index,
        image_grid_pinpoints=_pinpoints(config, where),
    )


def _pinpoints(config: PretrainedConfig, where: Path) -> tuple[tuple[int, int], ...]:
    """LLaVA-NeXT's resolutions; none of another LLaVA."""
    if config.model_type == "llava":
        return ()
    # What older releases wrote, which then had a choice.
    _require(where, "use_image_newline_parameter", getattr(config, "use_image_newline_parameter", True), True)
    try:
        found = parse_pinpoints(config.image_grid_pinpoints)
        Anyres(found).check(config.vision_config.image_size)
        return found
    except ConfigError as error:
        raise WeightsError(f"{where}: {error}") from error


def vision_spec(config: PretrainedConfig, where: Path, feature_layer: int, select: FeatureSelect) -> VisionSpec:
    """The spec of a CLIP or SigLIP tower, from its own config or from that of both halves."""
    config = getattr(config, "vision_config", config)
    families: dict[str, Literal["clip", "siglip"]] = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}
    if config.model_type not in families:
        raise WeightsError(f"{where}: vision tower {config.model_type!r}; expected one of {sorted(families)}.")
    _require(where, "num_channels", config.num_channels, 3)
    _require(where, "vision attention_dropout", config.attention_dropout, 0)
    if config.hidden_act not in ACTIVATIONS:
        raise WeightsError(f"{where}: hidden_act = {config.hidden_act!r}; expected one of {sorted(ACTIVATIONS)}.")
    return VisionSpec(
        family=families[config.model_type],
        image_size=config.image_size,
        patch_size=config.patch_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        activation=config.hidden_act,
        norm_eps=config.layer_norm_eps,
        feature_layer=feature_layer,
        feature_select=select,
    )


def check_projector(folder: Path, projector_type: str) -> None:
    """Checks that XTuner's projector folder says what `projector_type` does; others say nothing of their own.

    Source: xtuner/model/modules/projector of InternLM/xtuner.

    Raises:
        WeightsError: another depth or activation, or no biases.
    """
    file = folder / "config.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if found.get("model_type") != "projector":
        return
    for key, expected in (("depth", projector_depth(projector_type)), ("hidden_act", "gelu"), ("bias", True)):
        _require(file, key, found.get(key, expected), expected)


def text_spec(config: PretrainedConfig, where: Path, *, tied: bool | None = None) -> TextSpec:
    """The spec of a Llama, Mistral or InternLM2. `tied` overrides the config, for one that is part of a LLaVA's."""
    families: dict[str, Family] = {"llama": "llama", "mistral": "mistral", "internlm2": "internlm2"}
    if config.model_type not in families:
        raise WeightsError(f"{where}: language model {config.model_type!r}; expected llama, mistral or internlm2.")
    _require(where, "hidden_act", config.hidden_act, "silu")
    _require(where, "attention_dropout", config.attention_dropout, 0)
    for bias in ("attention_bias", "mlp_bias"):
        _require(where, bias, getattr(config, bias, False), False)
    return TextSpec(
        family=families[config.model_type],
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        norm_eps=config.rms_norm_eps,
        max_positions=config.max_position_embeddings,
        rope=_rope_spec(config.rope_parameters, where),
        sliding_window=getattr(config, "sliding_window", None),
        tied_embeddings=bool(config.tie_word_embeddings) if tied is None else tied,
    )


def _bad_sizes(section: object, prefix: str = "") -> Iterator[str]:
    """What is wrong with the numbers of a `config.json` as it was written, and of its parts."""
    if not isinstance(section, dict):
        return
    for key in SIZES:
        value = section.get(key)  # null leaves it to the family's default
        if value is not None and (type(value) is not int or value < 1):
            yield f"{prefix}{key} = {value!r}; expected a whole number of at least 1"
    width, heads = section.get("hidden_size"), section.get("num_attention_heads")
    if type(width) is int and type(heads) is int and heads > 0 and width % heads and not section.get("head_dim"):
        yield f"{prefix}hidden_size = {width} is not divisible by {prefix}num_attention_heads = {heads}"
    for part in ("text_config", "vision_config"):
        yield from _bad_sizes(section.get(part), f"{part}.")


def _rope_spec(parameters: dict[str, Any], where: Path) -> RopeSpec:
    parameters = {key: value for key, value in parameters.items() if value is not None}
    kind = parameters.get("rope_type", "default")
    if kind not in ("default", "linear", "dynamic", "llama3"):
        raise WeightsError(
            f"{where}: rope_type {kind!r} is not implemented; expected default, linear, dynamic or llama3."
        )
    names = {
        "rope_theta": "theta",
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_max_positions",
    }
    _require(where, "partial_rotary_factor", parameters.get("partial_rotary_factor", 1), 1)
    known = {*names, "rope_type", "type", "partial_rotary_factor"}  # `type` is what older releases called `rope_type`
    for key, value in parameters.items():
        if key not in known:
            raise WeightsError(f"{where}: {key} = {value!r} of the rope is not implemented; expected {sorted(names)}.")
        if key in names and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0):
            raise WeightsError(f"{where}: {key} = {value!r} of the rope; expected a number above 0.")
    return RopeSpec(kind=kind, **{names[key]: value for key, value in parameters.items() if key in names})


def _require(where: Path, key: str, found: object, expected: object) -> None:
    if found != expected:
        raise WeightsError(f"{where}: {key} = {found!r} is not implemented; expected {expected!r}.")
