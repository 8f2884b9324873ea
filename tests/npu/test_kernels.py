"""Every kernel of the npu backend on every case of the catalogue, and where its op's documentation sets traps."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from llava_core.backend import CATALOGUE, KernelSpec, MaskFacts, MaskSpec, OpRequest, reference, select
from llava_core.backend.ops import Case
from llava_core.errors import KernelUnavailable
from llava_core.testing.kernels import max_errors
from llava_npu.backend import NpuBackend
from llava_npu.kernels import KERNELS

pytestmark = pytest.mark.npu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [
    pytest.param(kernel, case, dtype, id=f"{kernel.op}-{kernel.name}-{case.name}-{str(dtype)[6:]}")
    for kernel in KERNELS
    for case in CATALOGUE[kernel.op].cases
    for dtype in DTYPES
]


def load(op: str, name: str, dtype: torch.dtype = torch.float32, **described: Any) -> Any:
    """The kernel's function; skips the test with the reason where this chip cannot serve."""
    if dtype not in NpuBackend().precision.compute:
        pytest.skip(f"this chip does not train in {dtype}")
    try:
        return select(KERNELS, OpRequest(op, "test", dtype, True, False, **described), pin=name).function
    except KernelUnavailable as refusal:
        pytest.skip(str(refusal))


@pytest.mark.parametrize(("kernel", "case", "dtype"), CASES)
def test_error_stays_within_the_references_own(
    kernel: KernelSpec, case: Case, dtype: torch.dtype, device: torch.device
) -> None:
    load(kernel.op, kernel.name, dtype, **case.describe)
    op = CATALOGUE[kernel.op]
    for part in max_errors(kernel, case, dtype, device):
        assert part.kernel_error <= op.error_multiple * part.reference_error + part.floor, part


def fusion(*masks: MaskFacts) -> Any:
    return load("attention", "fusion", head_dim=8, num_heads=4, num_kv_heads=2, masks=masks)


def attention_inputs(rows: int, tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, tokens, heads, 8, generator=generator) for heads in (4, 2, 2)]


def on_host_and_device(
    function: Any, inputs: list[Tensor], mask: MaskSpec, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """The output and the gradients of its squares' sum, by the reference on the host and by the kernel, on the host."""
    found = []
    for run, place in ((reference.attention, torch.device("cpu")), (function, device)):
        leaves = [x.to(place).requires_grad_() for x in inputs]
        out = run(*leaves, mask.to(place), 0.3)
        grads = torch.autograd.grad(out.square().sum(), leaves)
        found.append([x.detach().cpu() for x in (out, *grads)])
    return list(zip(*found, strict=True))


def test_more_packed_samples_than_one_call_takes(device: torch.device) -> None:
    host = (0, *accumulate(1 + i % 2 for i in range(1100)))
    mask = MaskSpec.packed(torch.tensor(host, dtype=torch.int32), host, causal=True)
    function = fusion(mask.facts())
    for expected, found in on_host_and_device(function, attention_inputs(1, host[-1]), mask, device):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # sums of at most two fp32 products


def test_empty_packed_samples_change_nothing(device: torch.device) -> None:
    host = (0, 0, 5, 5, 9, 9)
    mask = MaskSpec.packed(torch.tensor(host, dtype=torch.int32), host, causal=True)
    plain = MaskSpec.packed(torch.tensor((0, 5, 9), dtype=torch.int32), (0, 5, 9), causal=True).to(device)
    function, inputs = fusion(mask.facts()), [x.to(device) for x in attention_inputs(1, 9)]
    assert torch.equal(function(*inputs, mask.to(device), 0.3), function(*inputs, plain, 0.3))


def test_a_query_without_a_key_yields_zeros_and_no_gradient(device: torch.device) -> None:
    valid = torch.arange(6)[None, :] >= torch.tensor([[0], [3]])
    mask = MaskSpec.dense(causal=True, key_valid=valid)
    pairs = on_host_and_device(fusion(mask.facts()), attention_inputs(2, 6), mask, device)
    for expected, found in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # fp32, sums of six products
        assert not bool(found[1, :3].any())


def test_inference_leaves_nothing_behind_that_training_cannot_save(device: torch.device) -> None:
    function, mask = fusion(MaskFacts(False, True)), MaskSpec.dense(causal=True)
    with torch.inference_mode():
        function(*(x.to(device) for x in attention_inputs(1, 5)), mask, 0.3)
    q, k, v = (x.to(device).requires_grad_() for x in attention_inputs(1, 5))
    function(q, k, v, mask, 0.3).sum().backward()
    assert q.grad is not None


def test_rotary_of_one_token_in_many_rows(device: torch.device) -> None:
    function = load("rotary", "npu")
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(5, 1, heads, 8, generator=generator) for heads in (4, 2))
    angles = torch.randn(5, 1, 4, generator=generator).repeat(1, 1, 2)
    expected = reference.rotary(q, k, angles.cos(), angles.sin())
    found = function(*(x.to(device) for x in (q, k, angles.cos(), angles.sin())))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=1e-6)  # two products of fp32


def test_rotary_turns_gradients_back_by_tables_of_unlike_halves(device: torch.device) -> None:
    function = load("rotary", "npu")
    generator = torch.Generator().manual_seed(0)
    q, k, gq, gk = (torch.randn(2, 3, heads, 8, generator=generator) for heads in (4, 2, 4, 2))
    angles = torch.randn(2, 3, 8, generator=generator)
    results = []
    for run, place in ((reference.rotary, torch.device("cpu")), (function, device)):
        leaves = [x.to(place).requires_grad_() for x in (q, k)]
        outs = run(*leaves, angles.cos().to(place), angles.sin().to(place))
        results.append([g.cpu() for g in torch.autograd.grad(outs, leaves, [gq.to(place), gk.to(place)])])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # two products of fp32


def test_rotary_keeps_neither_q_nor_k(device: torch.device) -> None:
    function = load("rotary", "npu")
    q, k = (torch.ones(1, 3, heads, 8, device=device, requires_grad=True) for heads in (4, 2))
    table = torch.ones(1, 3, 8, device=device)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        function(q, k, table, table)
    assert set(kept) == {torch.Size((1, 3, 1, 8))}


@pytest.mark.parametrize("name", ["rms_norm", "swiglu"])
def test_rows_may_be_missing(name: str, device: torch.device) -> None:
    """The last layer runs on the labelled positions alone, of which a batch may have none."""
    function = load(name, "npu")
    x = torch.zeros(1, 0, 8, device=device, requires_grad=True)
    other = torch.ones(8, device=device, requires_grad=True) if name == "rms_norm" else torch.zeros_like(x)
    out = function(x, other, 1e-5) if name == "rms_norm" else function(x, other)
    out.sum().backward()
    assert out.shape == x.shape
    assert x.grad is not None


def test_swiglu_takes_a_gradient_that_is_not_contiguous(device: torch.device) -> None:
    function = load("swiglu", "npu")
    generator = torch.Generator().manual_seed(0)
    gate, up, grad = (torch.randn(6, 8, generator=generator) for _ in range(3))
    results = []
    for run, place in ((reference.swiglu, torch.device("cpu")), (function, device)):
        leaves = [x.to(place).requires_grad_() for x in (gate, up)]
        grads = torch.autograd.grad(run(*leaves), leaves, grad.to(place).t().contiguous().t())
        results.append([g.cpu() for g in grads])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # fp32, three products


@pytest.mark.parametrize("rows", [4, 37])
def test_cross_entropy_in_more_calls_than_one(rows: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    load("linear_cross_entropy", "npu")
    monkeypatch.setattr("llava_npu.fused_ops.MAX_LOSS_ROWS", rows)
    kernel = next(k for k in KERNELS if (k.op, k.name) == ("linear_cross_entropy", "npu"))
    for part in max_errors(kernel, CATALOGUE["linear_cross_entropy"].cases[0], torch.float32, device):
        assert part.kernel_error <= 3 * part.reference_error + part.floor, part
