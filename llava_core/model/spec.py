"""What a model is, in numbers: enough to build it, count it and export it. No tensors."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from llava_core.errors import ConfigError

Family = Literal["llama", "mistral", "internlm2"]

PROJECTOR_PATTERN = re.compile(r"linear|identity|mlp([2-9])x_gelu")


@dataclass(frozen=True)
class VisionSpec:
    """A CLIP or SigLIP vision transformer.

    Attributes:
        feature_layer: index into the hidden states, 0 being the embeddings; negative counts from the end.
        feature_select: `default` drops the class token, `full` keeps every token.
    """

    family: Literal["clip", "siglip"]
    image_size: int
    patch_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    activation: str
    norm_eps: float
    feature_layer: int = -2
    feature_select: Literal["default", "full"] = "default"

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ConfigError(f"vision: hidden_size {self.hidden_size} is not divisible by {self.num_heads} heads.")
        if self.family == "siglip" and self.feature_select == "default":
            raise ConfigError(
                "vision_feature_select = default drops the class token, and SigLIP has none: use `full`, "
                "or the first patch of each image would be lost."
            )
        if not -self.num_layers - 1 <= self.feature_layer <= self.num_layers:
            raise ConfigError(
                f"vision_feature_layer = {self.feature_layer}: the tower has {self.num_layers} layers; "
                f"choose from {-self.num_layers - 1} to {self.num_layers}."
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_positions(self) -> int:
        """Tokens inside the tower: the patches, and CLIP's class token."""
        return self.num_patches + (self.family == "clip")

    @property
    def visual_tokens(self) -> int:
        """Tokens that one image becomes in the language model."""
        return self.num_patches if self.feature_select == "default" else self.num_positions

    @property
    def num_layers_run(self) -> int:
        """Layers that the chosen features depend on."""
        return self.feature_layer if self.feature_layer >= 0 else self.num_layers + 1 + self.feature_layer


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding. `factor` and the fields after it belong to the scaled kinds.

    `dynamic` scales nothing up to the model's `max_positions`, beyond which nothing here goes: training refuses longer
    samples, generation ends there.

    Source: Llama-3.1's frequency-dependent scaling (`llama3`); position interpolation, arXiv:2306.15595 (`linear`);
    dynamic NTK scaling as in Hugging Face's `_compute_dynamic_ntk_parameters` (`dynamic`).
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "dynamic", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class TextSpec:
    """A decoder of the Llama family.

    Attributes:
        family: how its folders spell it; the computation is the same.
    """

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_positions: int
    rope: RopeSpec = RopeSpec()
    sliding_window: int | None = None
    tied_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"language: {self.num_heads} heads are not divisible by {self.num_kv_heads} kv heads.")


@dataclass(frozen=True)
class ModelSpec:
    """A LLaVA, or with `vision` None its language model alone.

    Attributes:
        projector: `linear`, `identity` or `mlpNx_gelu`.
        image_token_id: the id that stands for an image in exported tokenizers; None until one is assigned.
        image_grid_pinpoints: of a LLaVA-NeXT the (height, width) at which images are divided into tiles; else none.
    """

    text: TextSpec
    vision: VisionSpec | None = None
    projector: str = "mlp2x_gelu"
    image_token_id: int | None = None
    image_grid_pinpoints: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        projector_depth(self.projector)
        if self.image_grid_pinpoints and self.vision and self.vision.visual_tokens != self.vision.num_patches:
            raise ConfigError(
                "image_grid_pinpoints: tiles are for features of patches alone; vision_feature_select_strategy must "
                "leave the class token out."
            )
        if self.vision and self.projector == "identity" and self.vision.hidden_size != self.text.hidden_size:
            raise ConfigError(
                f"projector identity needs equal widths; vision has {self.vision.hidden_size}, "
                f"language {self.text.hidden_size}."
            )


def projector_depth(kind: str) -> int:
    """Number of linear layers of a projector type.

    Raises:
        ConfigError: unknown type.
    """
    match = PROJECTOR_PATTERN.fullmatch(kind)
    if match is None:
        raise ConfigError(f"projector type {kind!r}; expected linear, identity or mlpNx_gelu with N from 2 to 9.")
    return int(match.group(1)) if match.group(1) else int(kind == "linear")


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> list[float]:
    """Rotary frequencies in radians a position, head_dim / 2 of them, in double precision."""
    frequencies = [rope.theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    if rope.kind == "linear":
        return [f / rope.factor for f in frequencies]
    if rope.kind == "llama3":
        return [_llama3_scaled(f, rope) for f in frequencies]
    return frequencies


def _llama3_scaled(frequency: float, rope: RopeSpec) -> float:
    """Slow frequencies are divided by `factor`, fast ones kept, those between blended."""
    turns = rope.original_max_positions * frequency / (2 * math.pi)
    if turns < rope.low_freq_factor:
        return frequency / rope.factor
    if turns > rope.high_freq_factor:
        return frequency
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return (1 - blend) * frequency / rope.factor + blend * frequency
