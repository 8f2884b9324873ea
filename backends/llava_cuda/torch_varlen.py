"""Packed attention by torch's own flash-attention kernel: one call for all samples.

Source: torch/nn/attention/varlen.py of 2.13, and ATen/native/transformers/cuda/attention_backward.cu, where
`torch.use_deterministic_algorithms` also chooses the deterministic backward.
"""

from __future__ import annotations

import inspect

from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from llava_core.backend import MaskSpec, sdpa
from llava_cuda.lowering import max_length, window_size

_MISSING = {"scale", "window_size", "enable_gqa"} - set(inspect.signature(varlen_attn).parameters)
if _MISSING:
    # The function's first releases could neither scale nor window; a call would fail at the first step.
    raise ImportError(f"this torch's varlen_attn takes no {', '.join(sorted(_MISSING))}")


def attention(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, scale: float) -> Tensor:
    """The attention op: packed samples in one varlen call, dense rows through SDPA."""
    if mask.cu_seqlens is None:
        return sdpa.dense(q, k, v, mask, scale)
    length = max_length(mask)
    out = varlen_attn(
        q.squeeze(0),
        k.squeeze(0),
        v.squeeze(0),
        mask.cu_seqlens,
        mask.cu_seqlens,
        length,
        length,
        scale=scale,
        window_size=window_size(mask),
        enable_gqa=q.shape[2] != k.shape[2],
    )
    assert isinstance(out, Tensor)
    return out.unsqueeze(0)
