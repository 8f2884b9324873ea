"""`npu_fusion_attention` and its gradient. B batch, N heads, S sequence length, D head dim, T packed tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ascend_simulator.contract import require
from ascend_simulator.reference.attention_layouts import Layout, read_layout
from ascend_simulator.reference.attention_masks import Masking

OP = "npu_fusion_attention"
NO_LIMIT = 2147483647
# The statistics are repeated along a last dim of a block of the vector unit.
STATISTICS_WIDTH = 8


def fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = NO_LIMIT,
    next_tockens: int = NO_LIMIT,
    inner_precise: int = 0,
    prefix: list[int] | None = None,
    actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    seed: int = 0,
    offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    """Attention, softmax maximum and sum [B, N, S, 8] or [T, N, 8] in fp32, and four results that stay empty.

    `atten_mask=None` is full attention, whatever the sparse mode. A query that may see nothing is allowed only where
    `Masking` says so; the documentation does not say what it yields, so it yields NaN here.
    """
    _check_not_simulated(pse, padding_mask, keep_prob, prefix, sink, dropout_mask)
    layout = read_layout(query, key, value, head_num, input_layout, actual_seq_qlen, actual_seq_kvlen)
    known = softmax_layout == "" or (softmax_layout == "TND" and layout.packed)
    require(known, OP, "softmax_layout is empty, or TND for the layout TND", repr(softmax_layout))
    masking = Masking(atten_mask, sparse_mode, pre_tockens, next_tockens, inner_precise, layout.packed)
    masking.check()
    output = _empty_output(query, value, layout)
    maximum = query.new_empty(_statistics_shape(query, layout), dtype=torch.float32)
    total = torch.empty_like(maximum)
    for q, out, k, v, block_max, block_sum in _with_statistics(layout, query, output, key, value, maximum, total):
        masked = masking.masked_pairs(q, k)
        weights, row_max, row_sum = _softmax(q, k, masked, scale)
        out.copy_(weights.to(q.dtype) @ _repeat_heads(v, q.shape[1]))
        if masked is not None:
            out.masked_fill_(masked.all(-1, keepdim=True), math.nan)
        block_max.copy_(row_max.expand_as(block_max))
        block_sum.copy_(row_sum.expand_as(block_sum))
    return output, maximum, total, query.new_empty(0), 0, 0, 0


def fusion_attention_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dy: Tensor,
    head_num: int,
    input_layout: str,
    *,
    scale_value: float = 1.0,
    keep_prob: float = 1.0,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    pre_tockens: int = NO_LIMIT,
    next_tockens: int = NO_LIMIT,
    inner_precise: int = 0,
    prefix: list[int] | None = None,
    actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None,
    sparse_mode: int = 0,
    sink: Tensor | None = None,
    **saved: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, and two empty ones. The forward's results (`saved`) are computed again."""
    _check_not_simulated(pse, padding_mask, keep_prob, prefix, sink, None)
    layout = read_layout(query, key, value, head_num, input_layout, actual_seq_qlen, actual_seq_kvlen)
    masking = Masking(atten_mask, sparse_mode, pre_tockens, next_tockens, inner_precise, layout.packed)
    masking.check()
    grads = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for q, dout, dq, k, v, dk, dv in layout.blocks([query, dy, grads[0]], [key, value, *grads[1:]]):
        masked = masking.masked_pairs(q, k)
        weights, _, _ = _softmax(q, k, masked, scale_value)
        if masked is not None:
            weights = weights.masked_fill(masked, 0.0)
        wide, all_keys, all_values = dout.float(), _repeat_heads(k, q.shape[1]).float(), _repeat_heads(v, q.shape[1])
        weights_grad = wide @ all_values.float().mT
        scores_grad = weights * (weights_grad - (weights_grad * weights).sum(-1, keepdim=True)) * scale_value
        dq.copy_(scores_grad @ all_keys)
        dk.copy_(_sum_heads(scores_grad.mT @ q.float(), k.shape[1]))
        dv.copy_(_sum_heads(weights.mT @ wide, k.shape[1]))
    return *grads, query.new_empty(0), query.new_empty(0)


def _softmax(q: Tensor, k: Tensor, masked: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [B, N, Sq, Sk], and the rows' maximum and sum [B, N, Sq, 1], all in fp32."""
    scores = (q.float() @ _repeat_heads(k, q.shape[1]).float().mT) * scale
    if masked is not None:
        # The least finite number and not −inf, so that a row that sees nothing does not give NaN to its neighbours.
        scores = scores.masked_fill(masked, torch.finfo(torch.float32).min)
    maximum = scores.amax(-1, keepdim=True)
    exponentials = (scores - maximum).exp()
    total = exponentials.sum(-1, keepdim=True)
    return exponentials / total, maximum, total


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _sum_heads(grad: Tensor, key_heads: int) -> Tensor:
    return grad.unflatten(1, (key_heads, -1)).sum(2)


def _empty_output(query: Tensor, value: Tensor, layout: Layout) -> Tensor:
    if layout.name in ("BSH", "SBH"):
        width = value.shape[-1] // layout.key_heads * layout.heads
        return query.new_empty(*query.shape[:-1], width)
    return query.new_empty(*query.shape[:-1], value.shape[-1])


def _statistics_shape(query: Tensor, layout: Layout) -> tuple[int, ...]:
    if layout.packed:
        return query.shape[0], layout.heads, STATISTICS_WIDTH
    batch, length = query.shape[layout.name.index("B")], query.shape[layout.name.index("S")]
    return batch, layout.heads, length, STATISTICS_WIDTH


def _with_statistics(
    layout: Layout, query: Tensor, output: Tensor, key: Tensor, value: Tensor, *statistics: Tensor
) -> Iterator[tuple[Tensor, ...]]:
    """Blocks of all six; the statistics lie as the query does when packed, and are [B, N, S, 8] otherwise."""
    if layout.packed:
        for q, out, first, second, k, v in layout.blocks([query, output, *statistics], [key, value]):
            yield q, out, k, v, first, second
    else:
        for q, out, k, v in layout.blocks([query, output], [key, value]):
            yield q, out, k, v, *statistics


def _check_not_simulated(
    pse: Tensor | None,
    padding_mask: Tensor | None,
    keep_prob: float,
    prefix: list[int] | None,
    sink: Tensor | None,
    dropout_mask: Tensor | None,
) -> None:
    require(padding_mask is None, OP, "padding_mask is documented as not supported", "padding_mask=…")
    require(keep_prob == 1.0 and dropout_mask is None, OP, "dropout is not simulated", f"keep_prob={keep_prob}")
    require(pse is None and sink is None, OP, "pse and sink are not simulated", "one of them")
    require(prefix is None, OP, "prefix is for sparse modes 5 and 6, which are not simulated", prefix)
