"""SwiGLU with a backward pass of its own: how a vendor's pair of kernels becomes one op."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The swiglu op: silu(gate) · up, elementwise."""
    out: Tensor = _SwiGLU.apply(gate, up)
    return out


class _SwiGLU(torch.autograd.Function):
    """Keeps its two inputs for the backward pass, where autograd would keep silu(gate) as well."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up  # VENDOR: your forward kernel

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        # VENDOR: your backward kernel. In fp32, for in bf16 each product would round once more than the reference's.
        wide, given = gate.float(), grad.float()
        open_ = torch.sigmoid(wide)
        slope = open_ * (1 + wide * (1 - open_))  # d silu / d gate
        return (given * up.float() * slope).to(gate.dtype), (given * wide * open_).to(up.dtype)
