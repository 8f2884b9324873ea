"""Floating-point operations of a training step, counted from its shapes: the model's, whatever the kernels do."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise

from llava_core.data.batch import Batch
from llava_core.model.adapters import Adapters, LowRank
from llava_core.model.spec import ModelSpec, TextSpec, VisionSpec, projector_depth
from llava_core.train.adapter_flops import text_adapter_flops, vision_adapter_flops


def step_flops(
    spec: ModelSpec, trainable: Collection[str], batches: Sequence[Batch], adapters: Adapters | None = None
) -> float:
    """FLOPs of the forward and backward passes over a step's micro-batches; recomputation and padding are not work.

    A matmul of [m, k] by [k, n] is 2mkn. Its backward is as much again for the gradient of its input and as much for
    that of its weight, where each is needed: a frozen decoder above a trained projector passes gradients on but has
    none of its own, and a frozen tower has neither. A part with adapters has gradients of theirs alone. Causal
    attention does half of the square. What DoRA does for the norms of weights is not counted.
    """
    total = 0.0
    given = adapters.parts if adapters is not None else {}
    learns_below = bool({"projector", "vision"} & set(trainable))
    for batch in batches:
        language = _text_flops(spec.text, batch)
        attention = _causal_attention_flops(spec.text, batch)
        backward = learns_below or "language" in trainable
        own = "language" in trainable and "language" not in given
        total += language * (1 + backward + own) + attention * (1 + 2 * backward)
        if "language" in given:
            total += text_adapter_flops(spec.text, given["language"], batch, learns_below=learns_below)
        if spec.vision is not None:
            tower = vision_flops(spec.vision, trained="vision" in trainable, adapted=given.get("vision"))
            total += batch.counts.tiles * tower
            total += (batch.counts.image_tokens - batch.num_newlines) * projector_flops(spec, trainable)
    return total


def vision_flops(spec: VisionSpec, *, trained: bool, adapted: LowRank | None = None) -> float:
    """FLOPs of one tile through the layers that are run, and back where they learn; pixels have no gradient."""
    width, positions = spec.hidden_size, spec.num_positions
    matrices = 2 * positions * (4 * width**2 + 2 * width * spec.intermediate_size)
    attention = 4 * positions**2 * width
    patches = 2 * spec.num_patches * 3 * spec.patch_size**2 * width
    if adapted is not None:
        added = vision_adapter_flops(spec, adapted)
        return spec.num_layers_run * (matrices * 2 + attention * 3) + patches + added
    return spec.num_layers_run * (matrices + attention) * (1 + 2 * trained) + patches * (1 + trained)


def projector_flops(spec: ModelSpec, trainable: Collection[str]) -> float:
    """FLOPs of a feature, forward and backward; the first layer's input has a gradient only where the tower learns."""
    assert spec.vision is not None
    depth, out = projector_depth(spec.projector), spec.text.hidden_size
    total = 0.0
    for layer in range(depth):
        width = spec.vision.hidden_size if layer == 0 else out
        input_gradient = "vision" in trainable or (layer > 0 and "projector" in trainable)
        total += 2 * width * out * (1 + input_gradient + ("projector" in trainable))
    return total


def _text_flops(spec: TextSpec, batch: Batch) -> float:
    """The matmuls with weights; the head runs on labels only, as does the last layer after its attention."""
    heads, kv_heads = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    before = spec.hidden_size * (heads + 2 * kv_heads)
    after = spec.hidden_size * heads + 3 * spec.hidden_size * spec.intermediate_size
    tokens, labels = batch.counts.tokens, batch.counts.label_tokens
    rows = tokens * (spec.num_layers * before + (spec.num_layers - 1) * after)
    return 2.0 * (rows + labels * (after + spec.hidden_size * spec.vocab_size))


def _causal_attention_flops(spec: TextSpec, batch: Batch) -> float:
    """Scores and weighted values: 2 · 2 · length² / 2 for each head dim, or of the window where it is shorter."""
    window = spec.sliding_window or max(batch.cu_seqlens_host)
    spans = zip(pairwise(batch.cu_seqlens_host), batch.labels_per_sample, strict=False)  # without padding at the end
    lengths = [end - start for (start, end), _ in spans]
    pairs = sum(min(n, window) * (n - min(n, window) / 2) for n in lengths)
    return 4.0 * pairs * spec.num_heads * spec.head_dim * spec.num_layers
