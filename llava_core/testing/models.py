"""Tiny random models in Hugging Face's own classes, as folders too: the reference that tests compare with.

Every weight is scaled so that activations and logits are near one: then an absolute tolerance means something.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from llava_core.data.batch import Example, Merge
from llava_core.data.tiles import Anyres
from llava_core.model.spec import ModelSpec

VOCAB_SIZE = 96
IMAGE_TOKEN_ID = VOCAB_SIZE - 1
"""Never among the text tokens of `random_example`."""
TINY_PINPOINTS = ((24, 48), (48, 24), (48, 48), (24, 72))
"""(height, width), of tiles of 24 pixels."""
TINY_IMAGE_SIZES = ((24, 48), (48, 24), (48, 48), (24, 72), (30, 24), (40, 60), (90, 20), (16, 100))
"""(height, width) of images that become unequally many tokens, with black nowhere, above and below, or at the sides."""

_MODELS: dict[str, type[PreTrainedModel]] = {
    "clip_vision_model": CLIPVisionModel,
    "llama": LlamaForCausalLM,
    "llava": LlavaForConditionalGeneration,
    "llava_next": LlavaNextForConditionalGeneration,
    "mistral": MistralForCausalLM,
    "siglip_vision_model": SiglipVisionModel,
}


def tiny_text_config(family: Literal["llama", "mistral"] = "llama", **changes: Any) -> PretrainedConfig:
    """Two layers of 64, four heads of 16, with `changes` in Hugging Face's terms."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    classes: dict[str, type[PretrainedConfig]] = {"llama": LlamaConfig, "mistral": MistralConfig}
    return classes[family](**{**sizes, **changes})


def tiny_vision_config(family: Literal["clip", "siglip"] = "clip", **changes: Any) -> PretrainedConfig:
    """Four layers of 32, two heads of 16, nine patches."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": 24,
        "patch_size": 8,
    }
    classes: dict[str, type[PretrainedConfig]] = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}
    return classes[family](**{**sizes, **changes})


def tiny_llava_config(
    text: PretrainedConfig | None = None, vision: PretrainedConfig | None = None, **changes: Any
) -> LlavaConfig:
    """Llama and CLIP, where the caller brings no others."""
    return LlavaConfig(**_llava_settings(text, vision), **changes)


def tiny_llava_next_config(
    text: PretrainedConfig | None = None, vision: PretrainedConfig | None = None, **changes: Any
) -> LlavaNextConfig:
    """The same, for images of two to four tiles."""
    pinpoints = [list(point) for point in TINY_PINPOINTS]
    return LlavaNextConfig(**_llava_settings(text, vision), image_grid_pinpoints=pinpoints, **changes)


def _llava_settings(text: PretrainedConfig | None, vision: PretrainedConfig | None) -> dict[str, Any]:
    return {
        "text_config": text or tiny_text_config(),
        "vision_config": vision or tiny_vision_config(),
        "image_token_index": IMAGE_TOKEN_ID,
        "image_seq_length": 9,
    }


def tiny_model(
    config: PretrainedConfig, seed: int = 0, attention: Literal["eager", "sdpa"] = "eager"
) -> PreTrainedModel:
    """The Hugging Face model of a config in fp32, with `unit_scale_` weights; the global generator is untouched."""
    with torch.random.fork_rng(devices=[]):
        model = _MODELS[config.model_type]._from_config(config, attn_implementation=attention, dtype=torch.float32)
    return unit_scale_(model, seed).eval()


@torch.no_grad()
def unit_scale_(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Draw every parameter anew, so that each layer's output, and the logits, have a scale near one."""
    generator = torch.Generator().manual_seed(seed)
    tied = getattr(model.config, "tie_word_embeddings", False)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(_scaled(name, noise, tied))
    return model


def _scaled(name: str, noise: Tensor, tied: bool) -> Tensor:
    if name.endswith("embed_tokens.weight"):
        return noise * noise.shape[1] ** -0.5 if tied else noise  # tied, it is the output matrix too
    if name.endswith(("position_embedding.weight", "class_embedding")):
        return noise
    if name.endswith("bias"):
        return 0.1 * noise
    if noise.ndim == 1:
        return 1 + 0.1 * noise  # a norm's weight
    return noise / math.sqrt(noise[0].numel())


def save_folder(
    model: PreTrainedModel,
    folder: Path,
    *,
    layout: Literal["current", "classic"] = "classic",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Config and weights of `model` as a folder.

    Args:
        layout: `classic` has the names of folders on the hub, `current` is what `save_pretrained` of the installed
            transformers writes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "current":
        saved: Any = copy.deepcopy(model)
        saved.to(dtype).save_pretrained(folder)
        return folder
    config = copy.deepcopy(model.config)
    config.dtype, config.architectures = dtype, [type(model).__name__]
    config.save_pretrained(folder)
    tensors = {name: tensor.to(dtype).contiguous().clone() for name, tensor in classic_tensors(model).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def classic_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The parameters under the names that folders on the hub have; a tied head is left out."""
    return {classic_name(model, name): parameter.detach() for name, parameter in model.named_parameters()}


def classic_name(model: nn.Module, name: str) -> str:
    """The hub's name of a parameter that the installed transformers calls `name`."""
    if isinstance(model, CLIPVisionModel | SiglipVisionModel):
        return "vision_model." + name
    if not isinstance(model, LlavaForConditionalGeneration | LlavaNextForConditionalGeneration):
        return name
    prefixes = {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.image_newline": "image_newline",
    }
    prefix = next(p for p in prefixes if name.startswith(p))
    return prefixes[prefix] + name.removeprefix(prefix)


def random_example(spec: ModelSpec, text_lengths: Sequence[int], seed: int = 0, pad_id: int = 0) -> Example:
    """A sample with an image between every two pieces of text; one piece is a sample without an image.

    About half of the text tokens are supervised, and the last always is.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens: list[Tensor] = []
    supervised: list[Tensor] = []
    image_starts: list[int] = []
    images = [_random_image(spec, generator) for _ in text_lengths[1:]]
    for i, length in enumerate(text_lengths):
        if i > 0:
            image_starts.append(sum(piece.numel() for piece in tokens))
            tokens.append(torch.full((images[i - 1].visual_tokens,), pad_id))
            supervised.append(torch.zeros(images[i - 1].visual_tokens, dtype=torch.bool))
        tokens.append(torch.randint(1, IMAGE_TOKEN_ID, (length,), generator=generator))
        supervised.append(torch.rand(length, generator=generator) < 0.5)
    supervised[-1][-1:] = True
    pixels = None
    if images:
        assert spec.vision is not None, "a language model alone takes one piece of text"
        size = spec.vision.image_size
        pixels = torch.randn(sum(image.tiles for image in images), 3, size, size, generator=generator)
    merges = [image.merge for image in images if image.merge is not None]
    return Example(
        f"random-{seed}",
        torch.cat(tokens),
        torch.cat(supervised),
        tuple(image_starts),
        pixels,
        tuple(image.visual_tokens for image in images),
        Merge.joined(merges) if merges else None,
    )


class _Image(NamedTuple):
    tiles: int
    visual_tokens: int
    merge: Merge | None = None


def _random_image(spec: ModelSpec, generator: torch.Generator) -> _Image:
    """An image's shape: of LLaVA-NeXT's tiles one of `TINY_IMAGE_SIZES`."""
    assert spec.vision is not None, "a language model alone takes one piece of text"
    tile_tokens = spec.vision.visual_tokens
    if not spec.image_grid_pinpoints:
        return _Image(1, tile_tokens)
    size = TINY_IMAGE_SIZES[int(torch.randint(len(TINY_IMAGE_SIZES), (), generator=generator))]
    merge = Anyres(spec.image_grid_pinpoints).merge(size, spec.vision.image_size, tile_tokens)
    return _Image(merge.num_features // tile_tokens, len(merge.rows), merge)
