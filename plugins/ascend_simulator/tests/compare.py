"""Judges an op on the device by a plain formula in float64 on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Relative to the exact answer's largest value: a few roundings of fp32 sums of some hundred terms.
FP32_TOLERANCE = 2e-6
# One rounding of the result, and one of a value in between.
BF16_TOLERANCE = 2 * torch.finfo(torch.bfloat16).eps


def check_against_float64(
    op: Callable[..., Tensor], formula: Callable[..., Tensor], inputs: Sequence[Tensor], tolerance: float
) -> None:
    """Compares the output and each input's gradient; `op` gets the inputs on the device, `formula` in float64."""
    exact_inputs = [x.double().requires_grad_() for x in inputs]
    device_inputs = [x.to("npu").requires_grad_() for x in inputs]
    exact, actual = formula(*exact_inputs), op(*device_inputs)
    direction = torch.randn(exact.shape, dtype=torch.float32).to(actual.dtype)
    exact.backward(direction.double())
    actual.backward(direction.to("npu"))
    pairs = [(actual, exact), *((x.grad, y.grad) for x, y in zip(device_inputs, exact_inputs, strict=True))]
    for found, expected in pairs:
        assert found is not None
        assert expected is not None
        assert found.shape == expected.shape
        error = (found.detach().cpu().double() - expected.detach()).abs().max() / expected.detach().abs().max()
        assert error <= tolerance
