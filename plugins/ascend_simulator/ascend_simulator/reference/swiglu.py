"""The gated activation: silu of the **first** half, times the second."""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_simulator.contract import HALF_AND_FLOAT, require, require_dtype


def swiglu(input: Tensor, dim: int = -1) -> Tensor:
    """`npu_swiglu`: input's halves along `dim` are the gate and what it scales."""
    gate, up = _halves("npu_swiglu", input, dim)
    return (gate * gate.sigmoid() * up).to(input.dtype)


def swiglu_backward(grad: Tensor, input: Tensor, dim: int = -1) -> Tensor:
    """`npu_swiglu_backward`: the gradient of both halves."""
    gate, up = _halves("npu_swiglu_backward", input, dim)
    sigmoid, wide = gate.sigmoid(), grad.float()
    gate_grad = wide * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat((gate_grad, wide * gate * sigmoid), dim).to(input.dtype)


def _halves(op: str, input: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    require_dtype(op, "input", input, HALF_AND_FLOAT)
    require(1 <= input.dim() <= 8, op, "input has 1 to 8 dims", f"shape {tuple(input.shape)}")
    require(input.shape[dim] % 2 == 0, op, "the split dim is even", f"{input.shape[dim]}")
    gate, up = input.float().chunk(2, dim)
    return gate, up
