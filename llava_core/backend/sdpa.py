"""Lowers a MaskSpec to PyTorch's scaled_dot_product_attention, which runs on every device that PyTorch knows.

SDPA's own conventions: a bool mask is True where a query may attend, and `is_causal` is aligned top-left.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_core.backend.masks import MaskSpec
from llava_core.backend.reference import attend_mask


def dense(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, scale: float) -> Tensor:
    """Rows of equal length."""
    num_queries, num_keys = q.shape[1], k.shape[1]
    is_causal = mask.causal and num_queries == num_keys and mask.key_valid is None and _covers(mask.window, num_keys)
    needs_mask = not is_causal and _masks_anything(mask, num_queries, num_keys)
    bias = attend_mask(mask, num_queries, num_keys, q.device) if needs_mask else None
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=bias,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: MaskSpec,
    scale: float,
    dense: Callable[[Tensor, Tensor, Tensor, MaskSpec, float], Tensor] = dense,
) -> Tensor:
    """The attention op over a kernel for dense rows.

    Packed samples run one by one, or as rows of one call where their lengths agree.
    """
    if mask.cu_seqlens_host is None:
        return dense(q, k, v, mask, scale)
    rows = MaskSpec.dense(causal=mask.causal, window=mask.window)
    length = mask.uniform_length
    if length is not None:
        qs, ks, vs = (x.reshape(-1, length, *x.shape[2:]) for x in (q, k, v))
        return dense(qs, ks, vs, rows, scale).reshape(q.shape)
    samples = zip(*(x.split(mask.lengths, dim=1) for x in (q, k, v)), strict=True)
    return torch.cat([dense(qi, ki, vi, rows, scale) for qi, ki, vi in samples], dim=1)


def _covers(window: int | None, num_keys: int) -> bool:
    return window is None or window >= num_keys


def _masks_anything(mask: MaskSpec, num_queries: int, num_keys: int) -> bool:
    """False where every query sees every key: full attention, or one query at the end of its keys."""
    if mask.key_valid is not None:
        return True
    return mask.causal and not (num_queries == 1 and _covers(mask.window, num_keys))
