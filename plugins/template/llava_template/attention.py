"""Attention: a MaskSpec in the words of the vendor's library. PyTorch's own function stands in for that library.

How masks are lowered, which is where libraries differ most:

| MaskSpec | the library is told |
| --- | --- |
| not causal | nothing: without a mask it attends to everything |
| causal, as many queries as keys | its causal flag |
| causal with a window, or fewer queries than keys | a bool mask, True = attend |
| packed | one call a sample, each as above |
| padded keys | refused in `kernels.py` |
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # VENDOR: import your library here; this file is imported only if it is chosen
from torch import Tensor

from llava_core.backend import MaskSpec
from llava_core.backend.reference import attend_mask


def attention(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, scale: float) -> Tensor:
    """The attention op: q [B, Tq, N, H], k and v [B, Tk, G, H] -> [B, Tq, N, H]; see `llava_core.backend.reference`."""
    if mask.cu_seqlens is None:
        return _rows(q, k, v, mask, scale)
    # VENDOR: a call that takes mask.cu_seqlens (on the device) or mask.cu_seqlens_host (plain numbers) is faster.
    sample_mask = MaskSpec.dense(causal=mask.causal, window=mask.window)
    samples = zip(*(x.split(mask.lengths, dim=1) for x in (q, k, v)), strict=True)
    return torch.cat([_rows(qs, ks, vs, sample_mask, scale) for qs, ks, vs in samples], dim=1)


def _rows(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, scale: float) -> Tensor:
    options = lower(mask, q.shape[1], k.shape[1], q.device)
    # VENDOR: your layout (here [B, N, T, H]), and whether your library repeats grouped keys and values itself.
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped, **options).transpose(1, 2)


def lower(mask: MaskSpec, num_queries: int, num_keys: int, device: torch.device) -> dict[str, Any]:
    """The library's mask arguments for rows of equal length."""
    if not mask.causal:
        return {"is_causal": False}  # VENDOR: what does your library do without a mask?
    if mask.window is None and num_queries == num_keys:
        return {"is_causal": True}  # VENDOR: top left or bottom right? With equal lengths it is the same.
    # VENDOR: True = attend; `~` it if True means masked in your library.
    return {"attn_mask": attend_mask(mask, num_queries, num_keys, device)}
