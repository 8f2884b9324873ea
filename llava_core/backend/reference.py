"""Each op of the catalogue in plain PyTorch: slow, obvious, and what every kernel is judged against.

They keep float64 in float64, so that a kernel's error can be measured against an exact answer.
Shapes: B rows, T tokens, N query heads, G key/value heads, H head dim, D width, K supervised positions, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_core.backend.masks import MaskSpec


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are kept."""
    return torch.promote_types(dtype, torch.float32)


def attend_mask(mask: MaskSpec, num_queries: int, num_keys: int, device: torch.device) -> Tensor | None:
    """The mask as bool, True = attend: [Tq, Tk], or [B, 1, Tq, Tk] with padded keys; None for full attention."""
    allowed: Tensor | None = None
    query = torch.arange(num_queries, device=device)[:, None] + (num_keys - num_queries)
    key = torch.arange(num_keys, device=device)[None, :]
    if mask.causal:
        allowed = key <= query
        if mask.window is not None:
            allowed = allowed & (key > query - mask.window)
    if mask.cu_seqlens is not None:
        sample = torch.bucketize(key[0], mask.cu_seqlens[1:-1].to(key.dtype), right=True)
        same = sample[:, None] == sample[None, :]
        allowed = same if allowed is None else allowed & same
    if mask.key_valid is not None:
        valid = mask.key_valid[:, None, None, :]
        allowed = valid.expand(-1, 1, num_queries, -1) if allowed is None else allowed & valid
    return allowed


def attention(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, scale: float) -> Tensor:
    """Softmax attention. q [B, Tq, N, H], k and v [B, Tk, G, H], N a multiple of G -> [B, Tq, N, H]."""
    groups = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q @ k.transpose(-1, -2)).to(at_least_fp32(q.dtype)) * scale
    allowed = attend_mask(mask, q.shape[2], k.shape[2], q.device)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
        # A query that sees nothing: a row of -inf would give NaN; its weights are defined as zero.
        scores = scores.masked_fill(~allowed.any(-1, keepdim=True), 0.0)
    weights = torch.softmax(scores, dim=-1)
    if allowed is not None:
        weights = weights * allowed
    return (weights.to(v.dtype) @ v).transpose(1, 2)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] / rms(x) · weight [D]; the mean of squares in fp32, scaled in x's dtype (Llama's order of casts)."""
    wide = x.to(at_least_fp32(x.dtype))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight.to(x.dtype)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding, half-split layout. q [B, T, N, H], k [B, T, G, H], cos and sin [B, T, H]."""
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def rotate_half(x: Tensor) -> Tensor:
    """(x1, x2) -> (−x2, x1) over the halves of the last dim."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, elementwise."""
    return F.silu(gate) * up


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Σ_k weights[k] · cross_entropy(hidden[k] @ weight.T, targets[k]), a scalar in at least fp32.

    hidden [K, D], weight [V, D], targets [K] int64 (no ignored entries), weights [K] fp32. K = 0 gives a zero that
    still has a gradient.
    """
    logits = hidden @ weight.T
    losses = F.cross_entropy(logits.to(at_least_fp32(logits.dtype)), targets, reduction="none")
    return (losses * weights.to(losses.dtype)).sum()
