"""Floating-point operations of adapters, beside those of the layers that have them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from llava_core.data.batch import Batch
from llava_core.model.adapters import LowRank
from llava_core.model.spec import TextSpec, VisionSpec

Sizes = Mapping[str, tuple[int, int]]
"""Inputs and outputs of a layer's linear layers, by name."""

AT_THE_START = ("q_proj", "k_proj", "v_proj")
"""What reads a layer's input; it comes from nothing that learns where nothing below does."""


def text_adapter_flops(spec: TextSpec, adapted: LowRank, batch: Batch, *, learns_below: bool) -> float:
    """FLOPs of the adapters there and back, less those of the weights' inputs below which nothing learns."""
    heads, kv_heads = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    width, inner = spec.hidden_size, spec.intermediate_size
    sizes = {"q_proj": (width, heads), "k_proj": (width, kv_heads), "v_proj": (width, kv_heads)}
    sizes |= {"o_proj": (heads, width), "gate_proj": (width, inner), "up_proj": (width, inner)}
    sizes |= {"down_proj": (inner, width)}
    tokens, labels = batch.counts.tokens, batch.counts.label_tokens
    before = _there_and_back(sizes, adapted, AT_THE_START)
    after = _there_and_back(sizes, adapted, sizes.keys() - set(AT_THE_START))
    total = tokens * (spec.num_layers * before + (spec.num_layers - 1) * after) + labels * after
    return total - (0.0 if learns_below else tokens * _gradients_of_inputs(sizes, adapted))


def vision_adapter_flops(spec: VisionSpec, adapted: LowRank) -> float:
    """The same for one tile; nothing below the tower learns."""
    width, inner = spec.hidden_size, spec.intermediate_size
    sizes = dict.fromkeys((*AT_THE_START, "out_proj"), (width, width))
    sizes |= {"fc1": (width, inner), "fc2": (inner, width)}
    layer = _there_and_back(sizes, adapted, sizes)
    return spec.num_positions * (spec.num_layers_run * layer - _gradients_of_inputs(sizes, adapted))


def _there_and_back(sizes: Sizes, adapted: LowRank, among: Collection[str]) -> float:
    """Of a row: two products forward, and for each a gradient of its input and one of its weight."""
    return 3 * 2.0 * adapted.rank * sum(sum(sizes[name]) for name in adapted.targets if name in among)


def _gradients_of_inputs(sizes: Sizes, adapted: LowRank) -> float:
    """Of a row of the first layer: what its first weights and their adapters are spared."""
    weights = sum(sizes[name][0] * sizes[name][1] for name in AT_THE_START)
    return 2.0 * (weights + adapted.rank * sum(sizes[name][0] for name in AT_THE_START if name in adapted.targets))
