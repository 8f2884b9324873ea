"""Kernels with one defect each, as they occur in hardware libraries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_core.backend import KernelSpec, MaskSpec
from llava_core.backend import reference as ops
from llava_core.backend.kernels import always

# ---- attention -----------------------------------------------------------------------------------------------------


def with_allowed(change: Callable[[Tensor | None, MaskSpec, int, int], Tensor | None]) -> Callable[..., Tensor]:
    """Attention over a changed mask; the mask tensor [B, 1, Tq, Tk] or [Tq, Tk] is True = attend."""

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, scale: float) -> Tensor:
        num_queries, num_keys = q.shape[1], k.shape[1]
        right = ops.attend_mask(mask, num_queries, num_keys, q.device)
        return attend(q, k, v, change(right, mask, num_queries, num_keys), scale)

    return attention


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, scale: float) -> Tensor:
    """Correct attention over a mask tensor."""
    groups = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q @ k.transpose(-1, -2)).to(ops.at_least_fp32(q.dtype)) * scale
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -1e30)
    weights = torch.softmax(scores, dim=-1)
    if allowed is not None:
        weights = weights * allowed
    return (weights.to(v.dtype) @ v).transpose(1, 2)


inverted_mask = with_allowed(lambda right, *_: None if right is None else ~right)
full_for_causal = with_allowed(lambda right, mask, *_: None if mask.causal and mask.key_valid is None else right)
always_causal = with_allowed(lambda right, mask, tq, tk: lower(tq, tk) if right is None else right)
scale_dropped = lambda q, k, v, mask, scale: ops.attention(q, k, v, mask, q.shape[-1] ** -0.5)  # noqa: E731


def lower(num_queries: int, num_keys: int, diagonal: int = 0) -> Tensor:
    return torch.ones(num_queries, num_keys, dtype=torch.bool).tril(diagonal)


def top_left(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, scale: float) -> Tensor:
    if not mask.causal or mask.key_valid is not None or mask.window is not None or q.shape[1] == k.shape[1]:
        return ops.attention(q, k, v, mask, scale)
    return attend(q, k, v, lower(q.shape[1], k.shape[1]), scale)


def window_ignored(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, scale: float) -> Tensor:
    return ops.attention(q, k, v, replace(mask, window=None), scale)


def window_across_samples(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, scale: float) -> Tensor:
    if mask.window is None:
        return ops.attention(q, k, v, mask, scale)
    return ops.attention(q, k, v, replace(mask, cu_seqlens=None, cu_seqlens_host=None), scale)


def key_padding_ignored(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, scale: float) -> Tensor:
    return ops.attention(q, k, v, replace(mask, key_valid=None), scale)


def samples_ignored(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, scale: float) -> Tensor:
    return ops.attention(q, k, v, replace(mask, cu_seqlens=None, cu_seqlens_host=None), scale)


def nan_in_empty_rows(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, scale: float) -> Tensor:
    allowed = ops.attend_mask(mask, q.shape[1], k.shape[1], q.device)
    bias = None if allowed is None else torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf).to(q.dtype)
    heads_first = (x.transpose(1, 2) for x in (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)))
    weights = lambda a, b: torch.softmax((a @ b.transpose(-1, -2)) * scale + (0 if bias is None else bias), -1)  # noqa: E731
    q, k, v = heads_first
    return (weights(q, k) @ v).transpose(1, 2)


def sums_in_fp16(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, scale: float) -> Tensor:
    """Adds up the values one key after the other and rounds to fp16 each time."""
    groups = q.shape[2] // k.shape[2]
    allowed = ops.attend_mask(mask, q.shape[1], k.shape[1], q.device)
    wide_k, wide_v = (x.transpose(1, 2).repeat_interleave(groups, dim=1).float() for x in (k, v))
    scores = q.transpose(1, 2).float() @ wide_k.transpose(-1, -2) * scale
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -1e30)
    weights = torch.softmax(scores, -1) * (1 if allowed is None else allowed)
    exact = weights @ wide_v
    total = torch.zeros_like(exact)
    with torch.no_grad():
        for key in range(k.shape[1]):
            total = (total + weights[..., key : key + 1] * wide_v[..., key : key + 1, :]).half().float()
    return (exact + (total - exact).detach()).to(q.dtype).transpose(1, 2)


def cached_mask(key: Callable[[MaskSpec, int, int], Any]) -> Callable[..., Tensor]:
    """Attention that keeps mask tensors under a key that does not tell all masks apart."""
    cache: dict[Any, Tensor | None] = {}

    def change(right: Tensor | None, mask: MaskSpec, num_queries: int, num_keys: int) -> Tensor | None:
        return cache.setdefault(key(mask, num_queries, num_keys), right)

    return with_allowed(change)


def cached_by_address(mask: MaskSpec, num_queries: int, num_keys: int) -> Any:
    offsets = None if mask.cu_seqlens is None else mask.cu_seqlens.data_ptr()
    valid = None if mask.key_valid is None else tuple(mask.key_valid.flatten().tolist())
    return mask.causal, mask.window, offsets, valid, num_queries, num_keys


def cached_by_number_of_samples(mask: MaskSpec, num_queries: int, num_keys: int) -> Any:
    samples = None if mask.cu_seqlens is None else tuple(mask.cu_seqlens.shape)
    return cached_by_address(mask, num_queries, num_keys)[:2], samples, num_queries, num_keys, id(mask.key_valid)


def cached_by_padding_shape(mask: MaskSpec, num_queries: int, num_keys: int) -> Any:
    valid = None if mask.key_valid is None else tuple(mask.key_valid.shape)
    return mask.causal, mask.window, mask.cu_seqlens_host, valid, num_queries, num_keys


class LeakInBackward(torch.autograd.Function):
    """A right answer, and a gradient of the first token to which every token adds."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        return v.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        grad[:, 0] += 1e-3 * grad.sum(1)
        return grad


def leaks_in_backward(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, scale: float) -> Tensor:
    return ops.attention(q, k, LeakInBackward.apply(v * v.abs()) / v.abs().clamp(min=1e-6), mask, scale)


# ---- the other ops -------------------------------------------------------------------------------------------------


class ModeLeftBehind:
    """Sets a causal mode, and does not set it back."""

    causal = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, scale: float) -> Tensor:
        self.causal = self.causal or (mask.window is not None)
        return ops.attention(q, k, v, replace(mask, causal=mask.causal or self.causal), scale)


mode_left_behind = ModeLeftBehind()


class Halves(torch.autograd.Function):
    """A right gradient, computed in the memory of the one it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x / 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.div_(2)


def spoils_gradient(gate: Tensor, up: Tensor) -> Tensor:
    return Halves.apply(2 * ops.swiglu(gate, up))


def swapped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(up) * gate


def swapped_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """(x1, x2) -> (x2, −x1): the other direction."""
    return ops.rotary(q, k, cos, -sin)


def interleaved_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turns neighbouring channels together, as GPT-NeoX's older kin do."""

    def turn(x: Tensor) -> Tensor:
        pairs = x.unflatten(-1, (-1, 2)).flip(-1) * torch.tensor([-1.0, 1.0], dtype=x.dtype)
        return x * cos.unsqueeze(2) + pairs.flatten(-2) * sin.unsqueeze(2)

    return turn(q), turn(k)


def rotary_in_place(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    new_q, new_k = ops.rotary(q, k, cos, sin)
    q.data.copy_(new_q.detach())
    return new_q, new_k


def half_a_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor]:
    """Turns the queries alone."""
    turned, _ = ops.rotary(q, q + k.sum() * 0, cos, sin)
    return (turned,)


def wrong_without_gradients(gate: Tensor, up: Tensor) -> Tensor:
    return ops.swiglu(gate, up) if torch.is_grad_enabled() else torch.sigmoid(gate) * up


def reads_back(gate: Tensor, up: Tensor) -> Tensor:
    assert float(gate.detach().abs().amax().item()) >= 0
    return ops.swiglu(gate, up)


def unweighted_loss(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    return ops.linear_cross_entropy(hidden, weight, targets, torch.full_like(weights, 1 / max(len(weights), 1)))


def total_in_fp16(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    logits = (hidden @ weight.T).float()
    largest, total = logits.detach().amax(-1), torch.zeros(len(logits))
    for column in (logits.detach() - largest[:, None]).exp().unbind(1):
        total = (total + column).half().float()
    exact = logits.logsumexp(-1)
    log_total = exact + (largest + total.log() - exact).detach()
    return ((log_total - logits[torch.arange(len(targets)), targets]) * weights).sum()


def half_precision_loss(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    return ops.linear_cross_entropy(hidden, weight, targets, weights).to(hidden.dtype)


class ForgetsWeight(torch.autograd.Function):
    """x · rms(x)⁻¹ · weight, whose gradient of the weight is half of what it should be."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / 2


def wrong_gradient(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return ops.rms_norm(x, ForgetsWeight.apply(weight), eps)


def squares_in_fp16(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.half().square().mean(-1, keepdim=True) + eps).to(x.dtype) * weight


def eps_ignored(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return ops.rms_norm(x, weight, 1e-5)


def reads_past_the_end(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Loads whole tiles and gives what lies past the end a weight of zero, which does not make NaN harmless."""
    end = weight.storage_offset() + weight.numel()
    if (end + 8) * weight.element_size() > weight.untyped_storage().nbytes():
        return ops.rms_norm(x, weight, eps)
    tile = weight.detach().as_strided((8,), (1,), end)
    return ops.rms_norm(x, weight + (tile * 0).sum(), eps)


def assumes_contiguous(gate: Tensor, up: Tensor) -> Tensor:
    """Takes the memory from the first element on for the tensor."""
    flat = gate.as_strided(gate.shape, torch.empty(gate.shape, device="meta").stride(), gate.storage_offset())
    return F.silu(flat) * up


def not_repeatable(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return ops.rms_norm(x, weight, eps) * (1 + torch.finfo(x.dtype).eps * torch.randint(0, 2, x.shape).to(x.dtype))


cached_shape = cached_mask(cached_by_number_of_samples)
cached_address = cached_mask(cached_by_address)
cached_padding = cached_mask(cached_by_padding_shape)


def mutant_kernel(op: str, function: str, **changes: Any) -> KernelSpec:
    """A function of this module, offered as a kernel; a name of the references makes it the unmutated one."""
    module = __name__ if function in globals() else "llava_core.backend.reference"
    return replace(KernelSpec(op, "mutant", f"{module}:{function}", 50, always), **changes)
