"""Every kernel that is installed, on every case of the catalogue, on the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from llava_core.backend import CATALOGUE, KernelSpec, MaskSpec, OpRequest, sdpa, select
from llava_core.backend.ops import Case
from llava_core.errors import KernelUnavailable
from llava_core.testing.kernels import max_errors
from llava_cuda.kernels import KERNELS

pytestmark = pytest.mark.cuda

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


CASES = [
    pytest.param(kernel, case, dtype, id=f"{kernel.op}-{kernel.name}-{case.name}-{short(dtype)}")
    for kernel in KERNELS
    for case in CATALOGUE[kernel.op].cases
    for dtype in DTYPES
]


def load(kernel: KernelSpec, request: OpRequest) -> Any:
    """The kernel's function; skips the test with the reason where it cannot serve."""
    try:
        return select(KERNELS, request, pin=kernel.name).function
    except KernelUnavailable as refusal:
        pytest.skip(str(refusal))


@pytest.mark.parametrize(("kernel", "case", "dtype"), CASES)
def test_error_stays_within_the_references_own(
    kernel: KernelSpec, case: Case, dtype: torch.dtype, device: torch.device
) -> None:
    load(kernel, OpRequest(kernel.op, "test", dtype, True, False, **case.describe))
    op = CATALOGUE[kernel.op]
    for part in max_errors(kernel, case, dtype, device):
        assert part.kernel_error <= op.error_multiple * part.reference_error + part.floor, part


def packed_mask(device: torch.device, *lengths: int) -> MaskSpec:
    host = (0, *accumulate(lengths))
    return MaskSpec.packed(torch.tensor(host, dtype=torch.int32), host, causal=True).to(device)


def training_inputs(op: str, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any], int]:
    """An op's arguments at the size of a small model, what they ask for, and how many lead that need a gradient."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    if op == "attention":
        mask = packed_mask(device, 700, 1, 300, 1047)
        describe = {"head_dim": 128, "num_heads": 8, "num_kv_heads": 2, "masks": (mask.facts(),), "max_length": 1047}
        return (randn(1, 2048, 8, 128), randn(1, 2048, 2, 128), randn(1, 2048, 2, 128), mask, 0.088), describe, 3
    if op == "rms_norm":
        return (randn(1, 2048, 1024), randn(1024), 1e-5), {}, 2
    if op == "rotary":
        tables = (randn(1, 2048, 64).repeat(1, 1, 2) for _ in range(2))
        return (randn(1, 2048, 8, 128), randn(1, 2048, 2, 128), *tables), {}, 2
    if op == "swiglu":
        return (randn(2048, 2816), randn(2048, 2816)), {}, 2
    targets = torch.randint(0, 32000, (2048,), device=device)
    weights = torch.full((2048,), 1 / 2048, device=device)
    return (randn(2048, 1024), randn(32000, 1024) / 32, targets, weights), {}, 2


def run(function: Any, inputs: tuple[Any, ...], num_differentiable: int) -> list[Tensor]:
    """Outputs and gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs[:num_differentiable]]
    result = function(*leaves, *inputs[num_differentiable:])
    outputs = list(result) if isinstance(result, tuple) else [result]
    seeds = [torch.ones_like(o) for o in outputs]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, seeds)]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: f"{k.op}-{k.name}")
def test_inputs_stay_as_they_are(kernel: KernelSpec, device: torch.device) -> None:
    inputs, describe, leading = training_inputs(kernel.op, device)
    function = load(kernel, OpRequest(kernel.op, "test", torch.bfloat16, True, False, **describe))
    before = [x.clone() for x in inputs if isinstance(x, Tensor)]
    run(function, inputs, leading)
    after = [x for x in inputs if isinstance(x, Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.fixture
def reproducible(device: torch.device) -> None:
    torch.use_deterministic_algorithms(True)  # `device` puts it back


@pytest.mark.usefixtures("reproducible")
@pytest.mark.parametrize("kernel", [k for k in KERNELS if k.deterministic], ids=lambda k: f"{k.op}-{k.name}")
def test_the_same_input_gives_the_same_bits(kernel: KernelSpec, device: torch.device) -> None:
    inputs, describe, leading = training_inputs(kernel.op, device)
    function = load(kernel, OpRequest(kernel.op, "test", torch.bfloat16, True, True, **describe))
    first = run(function, inputs, leading)
    for _ in range(5):
        again = run(function, inputs, leading)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.fixture
def waiting_is_an_error(device: torch.device) -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("waiting_is_an_error")
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: f"{k.op}-{k.name}")
def test_a_step_never_waits_for_the_device(kernel: KernelSpec, device: torch.device) -> None:
    inputs, describe, leading = training_inputs(kernel.op, device)
    function = load(kernel, OpRequest(kernel.op, "test", torch.bfloat16, True, False, **describe))
    run(function, inputs, leading)  # compiles and allocates, which may wait
    torch.cuda.set_sync_debug_mode("error")
    run(function, inputs, leading)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_a_query_that_sees_nothing_stays_finite(dtype: torch.dtype, device: torch.device) -> None:
    """Left-padded prompts have such queries, and SDPA's fused kernels get a mask tensor for them."""
    valid = torch.arange(29, device=device)[None, :] >= torch.tensor([0, 5, 28], device=device)[:, None]
    mask = MaskSpec.dense(causal=True, key_valid=valid)
    q, k, v = (torch.randn(3, 29, 4, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    out = sdpa.attention(q, k, v, mask, 0.125)
    assert torch.equal(out[2, :28], torch.zeros_like(out[2, :28]))
    gradients = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    assert all(bool(g.isfinite().all()) for g in gradients)
