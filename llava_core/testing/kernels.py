"""Judges a kernel by its error against float64, beside the error that the reference itself makes in that dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava_core.backend.kernels import KernelSpec
from llava_core.backend.masks import MaskSpec
from llava_core.backend.ops import CATALOGUE, Case, Op
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


@dataclass(frozen=True)
class Standard:
    """What any kernel's results on a case are held against: outputs and gradients by name, on the host.

    Attributes:
        exact: the reference's in float64.
        reference: the reference's in the dtype under test.
        floors: of each part, see `PartError`.
    """

    exact: Mapping[str, Tensor]
    reference: Mapping[str, Tensor]
    floors: Mapping[str, float]

    def without_gradients(self) -> Standard:
        """The outputs alone."""
        exact = {part: value for part, value in self.exact.items() if part.startswith("output")}
        return Standard(exact, self.reference, self.floors)

    def errors(self, actual: Mapping[str, Tensor]) -> Iterator[PartError]:
        """The error of each part beside the reference's own."""
        for part, truth in self.exact.items():
            assert actual[part].shape == truth.shape, (
                f"{part} has shape {tuple(actual[part].shape)}, not {tuple(truth.shape)}"
            )
            yield PartError(part, _error(actual[part], truth), _error(self.reference[part], truth), self.floors[part])


def max_errors(
    kernel: KernelSpec, case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Iterator[PartError]:
    """The errors of each output and each gradient of `kernel` on `case`."""
    inputs = sample_inputs(case, dtype, seed)
    standard = build_standard(CATALOGUE[kernel.op], case, inputs, device)
    return standard.errors(run_case(resolve(kernel.load), case, [to_device(x, device) for x in inputs]))


def sample_inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> list[Any]:
    """The case's arguments on the host, the floating ones rounded to `dtype`."""
    return [_cast(x, dtype) for x in case.make(torch.Generator().manual_seed(seed))]


def build_standard(op: Op, case: Case, inputs: Sequence[Any], device: torch.device) -> Standard:
    """The exact results for `inputs`, and the reference's on `device`.

    All start from the same rounded inputs: only the arithmetic is judged, not the rounding of the inputs.
    """
    exact = run_case(op.reference, case, [_cast(x, torch.float64) for x in inputs])
    reference = run_case(op.reference, case, [to_device(x, device) for x in inputs])
    eps = torch.finfo(inputs[case.differentiable[0]].dtype).eps
    floors = {part: float(truth.abs().max()) * eps if truth.numel() else 0.0 for part, truth in exact.items()}
    return Standard(exact, reference, floors)


def run_case(function: Callable[..., Any], case: Case, inputs: Sequence[Any]) -> dict[str, Tensor]:
    """Outputs, and gradients for a fixed gradient of the outputs, by name. The inputs are passed as they lie."""
    leaves = [x.detach().requires_grad_() if i in case.differentiable else x for i, x in enumerate(inputs)]
    result = function(*leaves)
    outputs = list(result) if isinstance(result, tuple) else [result]
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
    grads = torch.autograd.grad(outputs, [leaves[i] for i in case.differentiable], seeds)
    parts = {f"output {i}": o for i, o in enumerate(outputs)}
    parts |= {f"gradient {i}": g for i, g in zip(case.differentiable, grads, strict=True)}
    return {name: tensor.detach() for name, tensor in parts.items()}


def to_device(value: Any, device: torch.device) -> Any:
    """A tensor's or mask's copy on `device`; anything else as it is."""
    if isinstance(value, MaskSpec):
        return value.to(device)
    return value.to(device, copy=True) if isinstance(value, Tensor) else value


def _error(actual: Tensor, truth: Tensor) -> float:
    difference = (actual.to("cpu", torch.float64) - truth).abs()
    return float(difference.max()) if difference.numel() else 0.0


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
