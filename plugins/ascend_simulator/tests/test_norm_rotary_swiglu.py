"""The elementwise fused ops: answers, gradients, and what they refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torch_npu
from ascend_simulator.contract import ContractError
from compare import BF16_TOLERANCE, FP32_TOLERANCE, check_against_float64
from torch import Tensor

TOLERANCES = [(torch.float32, FP32_TOLERANCE), (torch.bfloat16, BF16_TOLERANCE)]


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def tables(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    angles = torch.randn(shape)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_rms_norm(dtype: torch.dtype, tolerance: float) -> None:
    inputs = [torch.randn(3, 5, 16).to(dtype), torch.randn(16).to(dtype)]
    check_against_float64(
        lambda x, w: torch_npu.npu_rms_norm(x, w, 1e-5)[0],
        lambda x, w: F.rms_norm(x, (16,), w, 1e-5),
        inputs,
        tolerance,
    )


def test_rms_norm_returns_the_reciprocal_in_fp32() -> None:
    x = torch.randn(3, 16, dtype=torch.bfloat16)
    _, rstd = torch_npu.npu_rms_norm(x.npu(), torch.ones(16, dtype=torch.bfloat16, device="npu"), 1e-5)
    assert (rstd.shape, rstd.dtype) == ((3, 1), torch.float32)
    torch.testing.assert_close(rstd.cpu(), (x.float().square().mean(-1, keepdim=True) + 1e-5).rsqrt())


def test_add_rms_norm_has_no_backward() -> None:
    x1, x2, weight = torch.randn(2, 8), torch.randn(2, 8), torch.randn(8)
    normed, _, added = torch_npu.npu_add_rms_norm(x1.npu(), x2.npu(), weight.npu(), 1e-5)
    torch.testing.assert_close(added.cpu(), x1 + x2)
    torch.testing.assert_close(normed.cpu(), F.rms_norm(x1 + x2, (8,), weight, 1e-5))
    attached = torch_npu.npu_add_rms_norm(x1.npu().requires_grad_(), x2.npu(), weight.npu(), 1e-5)[0]
    with pytest.raises(RuntimeError, match="npu_add_rms_norm|does not require grad"):
        attached.sum().backward()


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_swiglu_gates_with_the_first_half(dtype: torch.dtype, tolerance: float) -> None:
    check_against_float64(
        torch_npu.npu_swiglu,
        lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
        [torch.randn(3, 5, 16).to(dtype)],
        tolerance,
    )


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("table_shape", [(1, 5, 1, 8), (2, 5, 1, 8), (2, 5, 3, 8)])
def test_rotary_mul(dtype: torch.dtype, tolerance: float, table_shape: tuple[int, ...]) -> None:
    check_against_float64(
        torch_npu.npu_rotary_mul,
        lambda x, cos, sin: x * cos + rotate_half(x) * sin,
        [torch.randn(2, 5, 3, 8).to(dtype), *tables(*table_shape, dtype=dtype)],
        tolerance,
    )


def test_rotary_mul_interleaved() -> None:
    check_against_float64(
        lambda x, cos, sin: torch_npu.npu_rotary_mul(x, cos, sin, "interleave"),
        lambda x, cos, sin: x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin,
        [torch.randn(2, 5, 3, 8), *tables(1, 5, 1, 8)],
        FP32_TOLERANCE,
    )


@pytest.mark.parametrize(
    ("x", "weight", "rule"),
    [
        (torch.randn(2, 8), torch.randn(4), "shape of input's last dims"),
        (torch.randn(2, 8), torch.randn(8, dtype=torch.float16), "gamma has input's dtype"),
        (torch.randn(8), torch.randn(8), "2 to 8 dims"),
        (torch.ones(2, 8, dtype=torch.int32), torch.ones(8, dtype=torch.int32), "input is float16"),
        (torch.randn(2, 8).double(), torch.randn(8).double(), "float64"),
    ],
)
def test_rms_norm_refuses(x: Tensor, weight: Tensor, rule: str) -> None:
    with pytest.raises(ContractError, match=rule):
        torch_npu.npu_rms_norm(x.npu(), weight.npu())


@pytest.mark.parametrize(
    ("shape", "table_shape", "mode", "rule"),
    [
        ((2, 5, 3, 7), (1, 5, 1, 7), "half", "D is even"),
        ((2, 5, 3, 896), (1, 5, 1, 896), "half", "below 896"),
        ((2, 5, 3, 8), (5, 8), "half", "4 dims"),
        ((2, 5, 3, 8), (1, 4, 1, 8), "half", "11SD, B1SD or BNSD"),
        ((2, 5, 3, 8), (2, 5, 1, 8), "interleave", "11SD"),
        ((2, 5, 3, 8), (1, 5, 1, 8), "quarter", "rotary_mode"),
    ],
)
def test_rotary_mul_refuses(shape: tuple[int, ...], table_shape: tuple[int, ...], mode: str, rule: str) -> None:
    cos, sin = tables(*table_shape)
    with pytest.raises(ContractError, match=rule):
        torch_npu.npu_rotary_mul(torch.randn(shape).npu(), cos.npu(), sin.npu(), mode)


def test_rotary_mul_refuses_tables_beyond_one_and_a_rotation_matrix() -> None:
    x, (cos, sin) = torch.randn(1, 5, 3, 8).npu(), tables(1, 5, 1, 8)
    with pytest.raises(ContractError, match="lies in"):
        torch_npu.npu_rotary_mul(x, 1.5 * torch.ones_like(cos).npu(), sin.npu())
    with pytest.raises(ContractError, match="rotation matrix"):
        torch_npu.npu_rotary_mul(x, cos.npu(), sin.npu(), "half", torch.eye(8).npu())


def test_swiglu_refuses_an_odd_width() -> None:
    with pytest.raises(ContractError, match="even"):
        torch_npu.npu_swiglu(torch.randn(2, 7).npu())
