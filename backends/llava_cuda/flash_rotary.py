"""Rotary embedding by flash-attn's Triton kernel, which writes new tensors and rounds once.

Source: flash-attn 2.8.3, flash_attn/layers/rotary.py and flash_attn/ops/triton/rotary.py. `interleaved=False` rotates
the two halves of the head dim, as Llama does; its tables hold one half, for ours repeat it.
"""

from __future__ import annotations

from flash_attn.layers.rotary import apply_rotary_emb
from torch import Tensor


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The rotary op. The kernel knows one table for all rows, so that the rows become one long sequence."""
    half = cos.shape[-1] // 2
    tables = [t.expand(q.shape[0], -1, -1)[..., :half].reshape(-1, half) for t in (cos, sin)]
    first, second = (apply_rotary_emb(x.reshape(1, -1, *x.shape[2:]), *tables).reshape(x.shape) for x in (q, k))
    return first, second
