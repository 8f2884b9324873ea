"""Checks of every kernel on every case of the catalogue, in every dtype that the backend computes in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import combinations
from typing import Any, TypeAlias

import torch
from torch import Tensor

from llava_core.backend import CATALOGUE, KernelSpec, MaskSpec
from llava_core.backend.ops import Case
from llava_core.testing.conformance import layouts
from llava_core.testing.conformance.check import Check, CheckFailed, CheckSkipped
from llava_core.testing.conformance.stress import STRESS
from llava_core.testing.conformance.subject import Subject, determinism, target
from llava_core.testing.kernels import to_device

REPEATS = 3
"""Runs that must agree bit for bit. Atomics that race do so in most runs, even on the catalogue's small cases."""

KernelCheck: TypeAlias = Callable[[Subject, KernelSpec, Case, torch.dtype], str]


def checks(subject: Subject) -> Iterator[Check]:
    """The list itself, and each kernel on each case."""
    listed = "kernels are of the catalogue's ops, and no two of an op share a name or a priority"
    yield Check("kernel.listed", "", listed, partial(_check_list, subject))
    for kernel, dtype in subject.kernel_dtypes():
        for case in CATALOGUE[kernel.op].cases:
            for name, (explanation, run) in CHECKS.items():
                bound = partial(run, subject, kernel, case, dtype)
                yield Check(name, target(kernel, case.name, dtype), explanation, bound, kernel.op, case.name)
        if kernel.op in STRESS:
            case, wide = STRESS[kernel.op], "sums are kept wide enough: no term is rounded away, no square overflows"
            bound = partial(_check_accuracy, subject, kernel, case, dtype)
            yield Check("kernel.accumulation", target(kernel, case.name, dtype), wide, bound, kernel.op)


def judge(
    subject: Subject,
    kernel: KernelSpec,
    case: Case,
    dtype: torch.dtype,
    actual: Mapping[str, Tensor],
    *,
    gradients: bool = True,
) -> str:
    """Hold results against the op's standard; returns the worst part's error as a multiple of what is allowed.

    Raises:
        CheckFailed: a part is missing, of another dtype or device than the reference's, or too far from exact.
    """
    op = CATALOGUE[kernel.op]
    _, standard = subject.standard(kernel.op, case, dtype)
    standard = standard if gradients else standard.without_gradients()
    if actual.keys() != standard.exact.keys():
        raise CheckFailed(f"the results are {', '.join(actual)}, not {', '.join(standard.exact)}")
    worst = 0.0
    for error in standard.errors(actual):
        found, expected = actual[error.part], standard.reference[error.part]
        if found.dtype != expected.dtype or found.device.type != subject.device.type:
            raise CheckFailed(f"{error.part} is {found.dtype} on {found.device}, not {expected.dtype} on the device")
        allowed = op.error_multiple * error.reference_error + error.floor
        if not error.kernel_error <= allowed:  # so that NaN fails
            raise CheckFailed(
                f"{error.part}: off by {error.kernel_error:.3g} from the exact answer; allowed {allowed:.3g}, which is "
                f"{op.error_multiple:g} × the reference's own {error.reference_error:.3g} + {error.floor:.3g}"
            )
        worst = max(worst, error.kernel_error / allowed if allowed else 0.0)
    return f"at most {worst:.2f} of the allowed error"


def _check_list(subject: Subject) -> str:
    kernels = subject.backend.kernels()
    if unknown := sorted({k.op for k in kernels} - set(CATALOGUE)):
        raise CheckFailed(f"kernels for ops that the catalogue does not have: {', '.join(unknown)}")
    for first, second in combinations(subject.kernels, 2):
        if first.op == second.op and first.name == second.name:
            raise CheckFailed(f"two kernels of {first.op} are called {first.name!r}")
        if first.op == second.op and first.priority == second.priority:
            raise CheckFailed(f"{first.op}: {first.name} and {second.name} both have priority {first.priority}")
    return f"{len(kernels)} kernels"


def _check_accuracy(subject: Subject, kernel: KernelSpec, case: Case, dtype: torch.dtype) -> str:
    function = subject.require(kernel, dtype, case.describe)
    inputs, _ = subject.standard(kernel.op, case, dtype)
    actual = subject.run(kernel, function, case, [to_device(x, subject.device) for x in inputs])
    return judge(subject, kernel, case, dtype, actual)


def _check_inputs_unchanged(subject: Subject, kernel: KernelSpec, case: Case, dtype: torch.dtype) -> str:
    """Without gradients too: there autograd does not notice a write into an input."""
    function = subject.require(kernel, dtype, case.describe)
    inputs, _ = subject.standard(kernel.op, case, dtype)
    passed = [to_device(x, subject.device) for x in inputs]
    with torch.no_grad(), determinism(kernel.deterministic):
        function(*passed)
    _expect_unchanged(passed, inputs, "the forward pass without gradients")
    subject.run(kernel, function, case, passed)
    _expect_unchanged(passed, inputs, "forward and backward")
    _expect_gradient_unchanged(subject, kernel, function, case, passed)
    return ""


def _expect_gradient_unchanged(
    subject: Subject, kernel: KernelSpec, function: Callable[..., Any], case: Case, inputs: list[Any]
) -> None:
    """Where a residual is added, autograd hands the same gradient to both branches."""
    leaves = [x.detach().requires_grad_() if i in case.differentiable else x for i, x in enumerate(inputs)]
    with determinism(kernel.deterministic):
        result = function(*leaves)
        outputs = list(result) if isinstance(result, tuple) else [result]
        gradients = [torch.full_like(output, 0.5) for output in outputs]
        torch.autograd.grad(outputs, [leaves[i] for i in case.differentiable], gradients)
    if any(bool((gradient != 0.5).any()) for gradient in gradients):
        raise CheckFailed("the backward pass writes into the gradient that it is given")


def _expect_unchanged(passed: list[Any], original: list[Any], when: str) -> None:
    for index, (found, expected) in enumerate(zip(passed, original, strict=True)):
        for after, before in zip(_tensors(found), _tensors(expected), strict=True):
            if not torch.equal(after.cpu(), before):
                raise CheckFailed(f"{when} changed argument {index}")


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, MaskSpec):
        return [x for x in (value.cu_seqlens, value.key_valid) if x is not None]
    return [value] if isinstance(value, Tensor) else []


def _check_inference(subject: Subject, kernel: KernelSpec, case: Case, dtype: torch.dtype) -> str:
    """Kernels often take another way where nothing is kept for a backward pass."""
    function = subject.require(kernel, dtype, case.describe, gradients=(False,))
    inputs, _ = subject.standard(kernel.op, case, dtype)
    with torch.no_grad(), determinism(kernel.deterministic):
        result = function(*(to_device(x, subject.device) for x in inputs))
    outputs = list(result) if isinstance(result, tuple) else [result]
    parts = {f"output {i}": output for i, output in enumerate(outputs)}
    return judge(subject, kernel, case, dtype, parts, gradients=False)


def _check_strided(subject: Subject, kernel: KernelSpec, case: Case, dtype: torch.dtype) -> str:
    function = subject.require(kernel, dtype, case.describe)
    inputs, _ = subject.standard(kernel.op, case, dtype)
    for layout in (layouts.sliced, layouts.reversed_dims):
        laid = layouts.relaid(subject, inputs, layout, masks=False)
        try:
            judge(subject, kernel, case, dtype, subject.run(kernel, function, case, laid))
        except CheckFailed as failure:
            raise CheckFailed(f"inputs laid out by `{layout.__name__}`: {failure}") from failure
    return ""


def _check_bounds(subject: Subject, kernel: KernelSpec, case: Case, dtype: torch.dtype) -> str:
    function = subject.require(kernel, dtype, case.describe)
    inputs, _ = subject.standard(kernel.op, case, dtype)
    for infinite in (False, True):
        laid = layouts.relaid(subject, inputs, partial(layouts.guarded, infinite=infinite), masks=True)
        try:
            judge(subject, kernel, case, dtype, subject.run(kernel, function, case, laid))
        except CheckFailed as failure:
            raise CheckFailed(f"with poison before and after each input: {failure}") from failure
    return ""


def _check_deterministic(subject: Subject, kernel: KernelSpec, case: Case, dtype: torch.dtype) -> str:
    if not kernel.deterministic:
        raise CheckSkipped("the kernel does not claim it")
    function = subject.require(kernel, dtype, case.describe)
    inputs, _ = subject.standard(kernel.op, case, dtype)
    first = subject.run(kernel, function, case, [to_device(x, subject.device) for x in inputs])
    for _ in range(REPEATS - 1):
        again = subject.run(kernel, function, case, [to_device(x, subject.device) for x in inputs])
        for part, expected in first.items():
            if not torch.equal(again[part], expected):
                raise CheckFailed(f"{part} has other bits when repeated on the same inputs")
    return ""


CHECKS: dict[str, tuple[str, KernelCheck]] = {
    "kernel.accuracy": (
        "outputs and gradients are as near to float64 as the reference in the same dtype",
        _check_accuracy,
    ),
    "kernel.inference": ("outputs are as near to float64 where no gradient is wanted", _check_inference),
    "kernel.inputs_unchanged": ("no argument is written to", _check_inputs_unchanged),
    "kernel.strided": ("slices of wider rows and permuted dims give the same answers", _check_strided),
    "kernel.bounds": ("nothing beside an input is read: NaN and infinity lie around each", _check_bounds),
    "kernel.deterministic": ("the same inputs give the same bits, gradients included", _check_deterministic),
}
