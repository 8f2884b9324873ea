"""RMS norm, alone and with a residual addition. Shapes: x [..., *G], gamma [*G]."""

from __future__ import annotations

from torch import Tensor

from ascend_simulator.contract import HALF_AND_FLOAT, require, require_dtype


def rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """`npu_rms_norm`: (input · rstd · gamma, rstd), rstd in fp32 with 1 in the place of gamma's dims."""
    _check("npu_rms_norm", input, gamma)
    wide = input.float()
    rstd = (wide.square().mean(_normed_dims(gamma), keepdim=True) + epsilon).rsqrt()
    return (wide * rstd * gamma.float()).to(input.dtype), rstd


def rms_norm_backward(grad: Tensor, input: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """`npu_rms_norm_backward`: gradients of input, in its dtype, and of gamma, in fp32."""
    _check("npu_rms_norm_backward", input, gamma)
    normed, scaled = input.float() * rstd, grad.float() * gamma.float()
    projection = (scaled * normed).mean(_normed_dims(gamma), keepdim=True)
    input_grad = rstd * (scaled - normed * projection)
    gamma_grad = (grad.float() * normed).reshape(-1, *gamma.shape).sum(0)
    return input_grad.to(input.dtype), gamma_grad


def add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """`npu_add_rms_norm`: (norm of x1 + x2, rstd, x1 + x2). torch_npu gives it no backward."""
    op = "npu_add_rms_norm"
    require(x1.shape == x2.shape, op, "x1 and x2 have one shape", f"{tuple(x1.shape)} and {tuple(x2.shape)}")
    require(x1.dtype == x2.dtype, op, "x1 and x2 have one dtype", f"{x1.dtype} and {x2.dtype}")
    added = x1 + x2
    normed, rstd = rms_norm(added, gamma, epsilon)
    return normed, rstd, added


def _normed_dims(gamma: Tensor) -> tuple[int, ...]:
    return tuple(range(-gamma.dim(), 0))


def _check(op: str, input: Tensor, gamma: Tensor) -> None:
    require_dtype(op, "input", input, HALF_AND_FLOAT)
    require(gamma.dtype == input.dtype, op, "gamma has input's dtype", f"{gamma.dtype} beside {input.dtype}")
    # torch_npu's text asks for 2 dims of gamma too, but its own example passes one.
    require(2 <= input.dim() <= 8, op, "input has 2 to 8 dims", f"shape {tuple(input.shape)}")
    require(
        1 <= gamma.dim() <= input.dim() and input.shape[-gamma.dim() :] == gamma.shape,
        op,
        "gamma has the shape of input's last dims",
        f"{tuple(gamma.shape)} beside {tuple(input.shape)}",
    )
