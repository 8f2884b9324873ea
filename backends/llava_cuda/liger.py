"""Liger's Triton kernels.

Source: liger-kernel 0.8.5, liger_kernel/ops/{rms_norm,rope,swiglu}.py. Its autograd functions write results over their
inputs and gradients, unseen by autograd; ops must not, so the kernels here get copies where they would.
"""

from __future__ import annotations

from typing import Any

import torch
from liger_kernel.ops.rms_norm import LigerRMSNormFunction
from liger_kernel.ops.rope import rope_backward, rope_forward
from liger_kernel.ops.swiglu import swiglu_backward, swiglu_forward
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The rms_norm op in Llama's order of casts: only the inverse root mean square in fp32."""
    offset, in_place = 0.0, False
    return LigerRMSNormFunction.apply(x, weight.to(x.dtype), eps, offset, "llama", in_place)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The rotary op: Hugging Face's half-split layout."""
    return _Rotary.apply(q, k, cos, sin)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The swiglu op. Keeps gate and up for the backward pass, and not silu(gate)."""
    return _SwiGLU.apply(gate, up)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        # Liger takes [B, N, T, H] and transposes back before it writes in place: the copies are contiguous.
        new_q, new_k, cos, sin = rope_forward(*_heads_first(q, k), cos, sin)
        ctx.save_for_backward(cos, sin)
        return new_q.transpose(1, 2), new_k.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        new_q, new_k = rope_backward(*_heads_first(grad_q, grad_k), cos, sin)
        return new_q.transpose(1, 2), new_k.transpose(1, 2), None, None


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.clone(memory_format=torch.contiguous_format).transpose(1, 2) for x in tensors)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up, out = swiglu_forward(gate.contiguous(), up.contiguous())
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        gate, up = (x.clone() for x in ctx.saved_tensors)
        grad_gate, grad_up = swiglu_backward(gate, up, grad.contiguous())
        return grad_gate.view(grad.shape), grad_up.view(grad.shape)
