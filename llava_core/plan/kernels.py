"""What kernels that cannot run here would keep in memory.

A vendor's fused kernel runs on its own device alone. For memory it is enough to know what it takes, and that is much
the same whoever wrote it: no score matrix in attention, and nothing between the steps of a norm. Where the device is
here, a place on which the plain reference runs is simulated with that.

Shapes: B rows, T tokens, N query heads, G key/value heads, H head dim, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llava_core.backend import Backend, MaskSpec, OpSet
from llava_core.backend.chunked_loss import linear_cross_entropy
from llava_core.backend.ops import SITES
from llava_core.engine.hardware import HOST
from llava_core.engine.opset import Use, build_ops
from llava_core.model.spec import ModelSpec

FUSED = "fused"
"""What a stand-in is called."""


def planned_ops(
    spec: ModelSpec, backend: Backend, use: Use, pins: Mapping[str, str], *, is_here: bool
) -> tuple[OpSet, dict[str, str]]:
    """The functions that take the memory of those that a run would be served with, and a name for each place.

    Args:
        is_here: the backend's device is there to be asked which kernels it runs; else fused ones are assumed.

    Raises:
        KernelUnavailable: as in the run itself.
    """
    if backend.device_type == HOST or is_here:
        ops, selections = build_ops(spec, backend, use, pins)
        names = {site: selection.kernel.name for site, selection in selections.items()}
        if backend.device_type == HOST:
            return ops, names
    else:
        ops, names = OpSet.of({}), dict.fromkeys(SITES, FUSED) | {"linear_cross_entropy": "chunked"}
    functions = {site: getattr(ops, site) for site in SITES}
    functions |= {site: STAND_INS[SITES[site]] for site, name in names.items() if name != "reference"}
    return OpSet(**functions), names


class _Attention(torch.autograd.Function):
    """As flash-attention 2: its inputs, its output and a number a row are kept, and the gradient of the queries is
    added up in fp32. Source: arXiv:2307.08691, algorithms 1 and 2."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v, _, row = ctx.saved_tensors
        sums, products = q.new_empty(q.shape, dtype=torch.float32), torch.empty_like(row)
        del sums, products
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class _RmsNorm(torch.autograd.Function):
    """Keeps its inputs and a number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class _Rotary(torch.autograd.Function):
    """Keeps the angles."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return torch.empty_like(q), torch.empty_like(k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, q: Tensor, k: Tensor) -> tuple[Tensor | None, ...]:
        return torch.empty_like(q), torch.empty_like(k), None, None


class _Swiglu(torch.autograd.Function):
    """Keeps its inputs."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return torch.empty_like(grad), torch.empty_like(grad)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, scale: float) -> Tensor:
    """The attention op, without values. q [B, Tq, N, H], k and v [B, Tk, G, H] -> [B, Tq, N, H]."""
    return _Attention.apply(q, k, v)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The rms_norm op, without values. [..., D] -> [..., D]."""
    return _RmsNorm.apply(x, weight)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The rotary op, without values. q [B, T, N, H] and k [B, T, G, H], as they are."""
    return _Rotary.apply(q, k, cos, sin)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The swiglu op, without values. [..., D] -> [..., D]."""
    return _Swiglu.apply(gate, up)


STAND_INS: Mapping[str, Callable[..., Any]] = {
    "attention": attention,
    "rms_norm": rms_norm,
    "rotary": rotary,
    "swiglu": swiglu,
    "linear_cross_entropy": linear_cross_entropy,
}
"""By op. The loss is every accelerator's own choice: plain PyTorch, a few rows at a time."""
