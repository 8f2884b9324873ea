"""Judges a kernel by its error against float64, beside the error that the reference itself makes in that dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava_core.backend.kernels import KernelSpec
from llava_core.backend.masks import MaskSpec
from llava_core.backend.ops import CATALOGUE, Case
from llava_core.plugins.registry import resolve


@dataclass(frozen=True)
class PartError:
    """Largest absolute errors of one output or gradient against float64.

    Attributes:
        floor: one unit in the last place at the exact answer's largest value, for parts that the reference gets right.
    """

    part: str
    kernel_error: float
    reference_error: float
    floor: float


def max_errors(
    kernel: KernelSpec, case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Iterator[PartError]:
    """The errors of each output and each gradient of `kernel` on `case`."""
    function, op = resolve(kernel.load), CATALOGUE[kernel.op]
    # All three start from the same rounded inputs: only the arithmetic is judged, not the rounding of the inputs.
    rounded = [_cast(x, dtype) for x in case.make(torch.Generator().manual_seed(seed))]
    exact = _run(op.reference, case, [_cast(x, torch.float64) for x in rounded])
    reference = _run(op.reference, case, [_to(x, device) for x in rounded])
    actual = _run(function, case, [_to(x, device) for x in rounded])
    for part, truth in exact.items():
        assert actual[part].shape == truth.shape, f"{kernel.name}: {part} has shape {tuple(actual[part].shape)}"
        floor = float(truth.abs().max()) * torch.finfo(dtype).eps if truth.numel() else 0.0
        yield PartError(part, _error(actual[part], truth), _error(reference[part], truth), floor)


def _run(function: Callable[..., Any], case: Case, inputs: list[Any]) -> dict[str, Tensor]:
    inputs = [x.clone().requires_grad_() if i in case.differentiable else x for i, x in enumerate(inputs)]
    result = function(*inputs)
    outputs = list(result) if isinstance(result, tuple) else [result]
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
    grads = torch.autograd.grad(outputs, [inputs[i] for i in case.differentiable], seeds)
    parts = {f"output {i}": o for i, o in enumerate(outputs)}
    parts |= {f"gradient {i}": g for i, g in zip(case.differentiable, grads, strict=True)}
    return {name: tensor.detach() for name, tensor in parts.items()}


def _error(actual: Tensor, truth: Tensor) -> float:
    difference = (actual.to("cpu", torch.float64) - truth).abs()
    return float(difference.max()) if difference.numel() else 0.0


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, MaskSpec):
        return value.to(device)
    return value.to(device) if isinstance(value, Tensor) else value
