"""The CPU's kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from llava_core.backend import KernelSpec, MaskSpec, No, OpRequest, Yes, sdpa
from llava_core.backend.kernels import Verdict, always
from llava_core.backend.reference import attend_mask

SHORT_KEYS = 256
"""Up to this many keys plain matmuls beat SDPA's CPU kernel in bf16: 10x at 17 keys, 5.6x at 60, 3x at 128, 1.2x at
256; from 400 on SDPA wins, and in fp32 it wins nearly everywhere (forward + backward, one thread, Xeon with AMX)."""


def _only_bf16(request: OpRequest) -> Verdict:
    if request.dtype == torch.bfloat16:
        return Yes()
    return No(f"SDPA measures faster in {request.dtype}")


def short_matmul_attention(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, scale: float) -> Tensor:
    """The attention op: plain matmuls for short rows and samples, SDPA for long ones."""
    return sdpa.attention(q, k, v, mask, scale, dense=_short_or_sdpa)


def _short_or_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, scale: float) -> Tensor:
    if k.shape[1] > SHORT_KEYS:
        return sdpa.dense(q, k, v, mask, scale)
    return _matmul(q, k, v, mask, scale)


def _matmul(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, scale: float) -> Tensor:
    num_queries, num_keys = q.shape[1], k.shape[1]
    groups = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q @ k.transpose(-1, -2)).float() * scale
    allowed = attend_mask(mask, num_queries, num_keys, q.device)
    if allowed is not None:
        # A large finite number, not -inf: a query that sees nothing must give zeros below, not NaN.
        scores = scores.masked_fill(~allowed, -1e30)
    weights = torch.softmax(scores, dim=-1)
    if mask.key_valid is not None and allowed is not None:
        weights = weights * allowed  # only padded keys can leave a query with nothing to see
    return (weights.to(v.dtype) @ v).transpose(1, 2)


KERNELS = (
    KernelSpec("attention", "short_matmul", "llava_cpu.kernels:short_matmul_attention", 20, _only_bf16),
    KernelSpec("attention", "sdpa", "llava_core.backend.sdpa:attention", 10, always),
)
