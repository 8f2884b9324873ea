"""The files of an export beside its weights: the tokenizer's, and specs as Hugging Face's JSON."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from llava_core.data.images import ImageProcessor
from llava_core.data.records import IMAGE_MARK
from llava_core.data.tiles import DynamicTiles
from llava_core.model.spec import Family, ModelSpec, RopeSpec, TextSpec, VisionSpec
from llava_core.weights.hf_config import OWN_PROJECTOR
from llava_core.weights.internlm2 import RemoteCode, own_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXPORTED_BY = {"exported_by": "llava-core"}
"""In `config.json`: the folder is an export, which a later export may replace."""

WRITTEN_AS: dict[Family, tuple[str, str]] = {
    "llama": ("llama", "LlamaForCausalLM"),
    "mistral": ("mistral", "MistralForCausalLM"),
    "internlm2": ("llama", "LlamaForCausalLM"),
}
"""Each family's type and class in transformers, which has none for InternLM2, and needs none: see `internlm2`."""


def write_files(
    folder: Path,
    spec: ModelSpec,
    tokenizer: PreTrainedTokenizerBase,
    ends: Sequence[int],
    dtype: torch.dtype,
    *,
    image_processor: ImageProcessor | None,
    remote: RemoteCode | None,
) -> None:
    """All of a folder but its weights; `ends` are the tokens that end an answer."""
    tokenizer.save_pretrained(folder)
    if image_processor is not None and isinstance(image_processor.tiling, DynamicTiles):
        _name_no_marks(folder / "tokenizer_config.json")
    for file in remote.files if remote is not None else ():
        shutil.copyfile(file, folder / file.name)
    for name, content in _configs(spec, tokenizer, ends, dtype, image_processor, remote).items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _configs(
    spec: ModelSpec,
    tokenizer: PreTrainedTokenizerBase,
    ends: Sequence[int],
    dtype: torch.dtype,
    image_processor: ImageProcessor | None,
    remote: RemoteCode | None,
) -> dict[str, dict[str, Any]]:
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else list(ends),
        "pad_token_id": tokenizer.pad_token_id,
    }
    version = {"transformers_version": transformers.__version__}
    # `torch_dtype` is read by every release; `dtype` by new ones alone.
    config = _model_config(spec) | ids | EXPORTED_BY | {"torch_dtype": str(dtype).removeprefix("torch.")} | version
    if spec.vision is None or image_processor is None:
        if spec.text.family == "internlm2":
            config = own_config(config, remote)
        return {"config.json": config, "generation_config.json": ids | version}
    config["text_config"] |= ids
    return {
        "config.json": config,
        "generation_config.json": ids | version,
        **_processor_configs(spec.vision, image_processor),
    }


def _processor_configs(vision: VisionSpec, image_processor: ImageProcessor) -> dict[str, dict[str, Any]]:
    """An image processor's config, and that of the processor which counts its visual tokens."""
    images = image_processor.to_config()
    if isinstance(image_processor.tiling, DynamicTiles):
        # LlavaProcessor does not count tiles. This one does, and writes marks around them, here empty ones; its
        # `patch_size` is the side of the square of a tile's tokens.
        side = {"patch_size": math.isqrt(vision.visual_tokens)}
        name = {"processor_class": "Cohere2VisionProcessor"}
        return {"preprocessor_config.json": images | name | side, "processor_config.json": name}
    return {
        "preprocessor_config.json": images,
        "processor_config.json": _processor_config(vision, images["processor_class"]),
    }


def _name_no_marks(file: Path) -> None:
    """Have the processor of tiles write nothing between them."""
    marks = {"image_token": IMAGE_MARK, **dict.fromkeys(("boi_token", "eoi_token", "img_line_break_token"), "")}
    config = json.loads(file.read_text(encoding="utf-8")) | {"extra_special_tokens": marks}
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _processor_config(vision: VisionSpec, processor_class: str) -> dict[str, Any]:
    return {
        "processor_class": processor_class,
        "image_token": IMAGE_MARK,
        "patch_size": vision.patch_size,
        # transformers counts an image's tokens as patches + this, less one where the class token is dropped.
        "num_additional_image_tokens": vision.num_positions - vision.num_patches,
        "vision_feature_select_strategy": vision.feature_select,
    }


def _model_config(spec: ModelSpec) -> dict[str, Any]:
    """Most of `config.json`, spelt so that older releases of transformers read it too."""
    if spec.vision is None:
        return {"architectures": [_causal_class(spec.text)], **_text_config(spec.text)}
    next_only: dict[str, Any] = {}
    if spec.image_grid_pinpoints:
        next_only = {"image_grid_pinpoints": [list(point) for point in spec.image_grid_pinpoints]}
    return {
        "architectures": [f"Llava{'Next' if next_only else ''}ForConditionalGeneration"],
        "model_type": "llava_next" if next_only else "llava",
        **next_only,
        "image_token_index": spec.image_token_id,
        "image_seq_length": spec.vision.visual_tokens,
        "projector_hidden_act": "gelu" if spec.projector == "mlp2x_gelu" else OWN_PROJECTOR + spec.projector,
        "multimodal_projector_bias": True,
        "vision_feature_layer": spec.vision.feature_layer,
        "vision_feature_select_strategy": spec.vision.feature_select,
        "tie_word_embeddings": spec.text.tied_embeddings,
        "text_config": _text_config(spec.text),
        "vision_config": _vision_config(spec.vision),
    }


def _rope_config(rope: RopeSpec) -> dict[str, Any]:
    scaling: dict[str, Any] | None = None
    if rope.kind in ("linear", "dynamic"):
        scaling = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        scaling = {
            "rope_type": "llama3",
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_positions,
        }
    return {"rope_theta": rope.theta, "rope_scaling": scaling}


def _text_config(spec: TextSpec) -> dict[str, Any]:
    window = {"sliding_window": spec.sliding_window} if spec.family == "mistral" else {}
    return {
        "architectures": [_causal_class(spec)],
        "model_type": WRITTEN_AS[spec.family][0],
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": spec.norm_eps,
        "max_position_embeddings": spec.max_positions,
        "tie_word_embeddings": spec.tied_embeddings,
        **_rope_config(spec.rope),
        **window,
    }


def _vision_config(spec: VisionSpec) -> dict[str, Any]:
    # SigLIP's pooling head is not part of a LLaVA; saying so keeps transformers from making up random weights for it.
    head = {"vision_use_head": False} if spec.family == "siglip" else {"projection_dim": spec.hidden_size}
    return {
        "model_type": f"{spec.family}_vision_model",
        "image_size": spec.image_size,
        "patch_size": spec.patch_size,
        "num_channels": 3,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "hidden_act": spec.activation,
        "layer_norm_eps": spec.norm_eps,
        **head,
    }


def _causal_class(spec: TextSpec) -> str:
    return WRITTEN_AS[spec.family][1]
