"""Rotary embedding. Shapes: input [B, N, S, D], [B, S, N, D] or [S, B, N, D]; cos and sin with 1 for N, and for B."""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_simulator.contract import HALF_AND_FLOAT, require, require_dtype

OP = "npu_rotary_mul"
MAX_HEAD_DIM = 896
MAX_ROWS = 1000


def rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    """`npu_rotary_mul`: r1 · input + r2 · rotated(input); `r1` is the cosine and `r2` the sine."""
    require(rotate is None, OP, "a rotation matrix has no backward and is not simulated", "rotate=…")
    _check(input, r1, r2, rotary_mode)
    return (r1.float() * input.float() + r2.float() * _rotate(input.float(), rotary_mode)).to(input.dtype)


def rotary_mul_backward(
    grad: Tensor, input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half"
) -> tuple[Tensor, Tensor, Tensor]:
    """`npu_rotary_mul_backward`: gradients of input, r1 and r2."""
    _check(input, r1, r2, rotary_mode)
    wide = grad.float()
    # The rotation is a quarter turn: its transpose is its negative.
    input_grad = wide * r1.float() - _rotate(wide * r2.float(), rotary_mode)
    r1_grad = (wide * input.float()).sum_to_size(r1.shape)
    r2_grad = (wide * _rotate(input.float(), rotary_mode)).sum_to_size(r2.shape)
    return input_grad.to(input.dtype), r1_grad.to(r1.dtype), r2_grad.to(r2.dtype)


def _rotate(x: Tensor, mode: str) -> Tensor:
    if mode == "half":
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def _check(input: Tensor, r1: Tensor, r2: Tensor, mode: str) -> None:
    for name, tensor in (("input", input), ("r1", r1), ("r2", r2)):
        require_dtype(OP, name, tensor, HALF_AND_FLOAT)
        require(tensor.dim() == 4, OP, f"{name} has 4 dims", f"shape {tuple(tensor.shape)}")
        require(tensor.dtype == input.dtype, OP, f"{name} has input's dtype", f"{tensor.dtype} beside {input.dtype}")
    require(mode in ("half", "interleave"), OP, "rotary_mode is 'half' or 'interleave'", repr(mode))
    require(r1.shape == r2.shape, OP, "r1 and r2 have one shape", f"{tuple(r1.shape)} and {tuple(r2.shape)}")
    head_dim = input.shape[-1]
    require(head_dim % 2 == 0 and head_dim < MAX_HEAD_DIM, OP, f"D is even and below {MAX_HEAD_DIM}", head_dim)
    require(
        any(_table_fits(input, r1, layout, mode) for layout in ("BNSD", "BSND", "SBND")),
        OP,
        "r1 and r2 are 11SD, B1SD or BNSD for an input BNSD (and alike for BSND and SBND; interleave: 11SD only)",
        f"{tuple(r1.shape)} beside {tuple(input.shape)}",
    )
    for name, tensor in (("r1", r1), ("r2", r2)):
        require(bool(tensor.abs().max() <= 1.0), OP, f"{name} lies in [−1, 1]", f"{float(tensor.abs().max()):.4g}")


def _table_fits(input: Tensor, table: Tensor, layout: str, mode: str) -> bool:
    """Whether the table's shape is one of those documented for that layout of input."""
    if input.shape[layout.index("B")] >= MAX_ROWS or input.shape[layout.index("N")] >= MAX_ROWS:
        return False
    ones = ["BN"] if mode == "interleave" else ["BN", "N", ""]
    return any(
        tuple(table.shape) == tuple(1 if axis in one else size for axis, size in zip(layout, input.shape, strict=True))
        for one in ones
    )
