"""What the npu backend's kernels accept and how masks are lowered, tested without torch_npu."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from llava_core.backend import CATALOGUE, KernelSpec, MaskFacts, MaskSpec, No, OpRequest, Yes, reference_kernels, select
from llava_core.backend.reference import attend_mask
from llava_core.errors import KernelUnavailable
from llava_npu import kernels, lowering

CPU = torch.device("cpu")
A2, A3, A5, FIRST = "Ascend910B2", "Ascend910_9392", "Ascend950PR_9579", "Ascend910A"
PACKED = MaskFacts(packed=True, causal=True)
CACHED = MaskFacts(packed=False, causal=True, key_padding=True, unequal_lengths=True)


def attention_request(**changes: Any) -> OpRequest:
    """The language model of a 7B LLaVA."""
    request = OpRequest("attention", "attention", torch.bfloat16, True, False, 128, 32, 32, (PACKED,), 2048)
    return replace(request, **changes)


def plain_request(op: str, **changes: Any) -> OpRequest:
    return replace(OpRequest(op, op, torch.bfloat16, True, False), **changes)


def offer(op: str, name: str) -> KernelSpec:
    return next(k for k in kernels.KERNELS if (k.op, k.name) == (op, name))


# ---- verdicts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("soc", "changes", "reason"),
    [
        (A2, {}, None),
        (A3, {}, None),
        (A5, {}, None),
        (A2, {"masks": (PACKED, CACHED), "needs_grad": False}, None),
        (A2, {"deterministic": True}, None),
        (A2, {"num_kv_heads": 8}, None),
        (A2, {"head_dim": 768}, None),
        (A2, {"head_dim": 72, "dtype": torch.float32}, None),
        (A2, {"head_dim": 7}, None),
        (FIRST, {}, "not listed for Ascend910A"),
        ("Ascend910B", {}, "not listed for Ascend910B"),
        ("Ascend310P3", {}, "not listed for Ascend310P3"),
        (A2, {"dtype": torch.float64}, "not in torch.float64"),
        (A2, {"head_dim": 769}, "not 769"),
        (A2, {"head_dim": None}, "not None"),
        (A2, {"head_dim": 7, "dtype": torch.float32}, "multiple of 4 in fp32, not 7"),
        (A2, {"num_heads": 512}, "not 512 and 32"),
        (A2, {"num_kv_heads": 12}, "not 32 and 12"),
        (A2, {"max_length": (1 << 20) + 1}, "not 1048577"),
    ],
)
def test_attention_verdicts(soc: str, changes: dict[str, Any], reason: str | None) -> None:
    expect(kernels.attention_limits(attention_request(**changes), soc), reason)


@pytest.mark.parametrize(
    ("soc", "changes", "reason"),
    [
        (A2, {}, None),
        (A5, {"head_dim": 128, "num_heads": 32, "num_kv_heads": 8}, None),
        (FIRST, {}, "not listed for Ascend910A"),
        (A2, {"head_dim": 65}, "not 65"),
        (A2, {"head_dim": 896}, "not 896"),
        (A2, {"num_heads": 1000}, "not 1000 and None"),
    ],
)
def test_rotary_verdicts(soc: str, changes: dict[str, Any], reason: str | None) -> None:
    expect(kernels.rotary_limits(plain_request("rotary", **changes), soc), reason)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused_ops_compute_in_the_dtypes_that_are_trained_in(dtype: torch.dtype) -> None:
    assert kernels.fused_limits(plain_request("rms_norm", dtype=dtype), A2) == Yes()


def test_fused_ops_refuse_other_dtypes() -> None:
    expect(kernels.fused_limits(plain_request("swiglu", dtype=torch.float64), A2), "not in torch.float64")


def expect(verdict: object, reason: str | None) -> None:
    if reason is None:
        assert verdict == Yes()
    else:
        assert isinstance(verdict, No)
        assert reason in verdict.reason


# ---- selection ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("soc", "chosen"),
    [
        (A2, ["fusion", "npu", "npu", "npu", "chunked"]),
        (A5, ["fusion", "npu", "npu", "npu", "chunked"]),
        (FIRST, ["reference", "reference", "reference", "reference", "chunked"]),
    ],
)
def test_the_vendors_kernels_are_preferred_where_the_chip_has_them(
    soc: str, chosen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "soc_name", lambda: soc)
    requests = [
        attention_request(dtype=torch.float32) if op == "attention" else plain_request(op, dtype=torch.float32)
        for op in CATALOGUE
    ]
    offered = [replace(k, requires=None) for k in (*kernels.KERNELS, *reference_kernels())]
    best = [max((k for k in offered if k.verdict(r) == Yes() and k.op == r.op), key=rank).name for r in requests]
    assert best == chosen


def rank(kernel: KernelSpec) -> int:
    return kernel.priority


def test_a_pinned_kernel_names_the_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_core.backend.kernels.is_installed", lambda module: False)
    with pytest.raises(KernelUnavailable, match="torch_npu is not installed"):
        select(kernels.KERNELS, attention_request(), pin="fusion")


def test_without_a_chip_no_fused_kernel_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "soc_name", lambda: None)
    assert offer("rms_norm", "npu").supports(plain_request("rms_norm")) == No("no NPU to ask for its name")


def test_every_kernel_is_of_the_catalogue() -> None:
    assert {k.op for k in kernels.KERNELS} == set(CATALOGUE)


# ---- lowering ----------------------------------------------------------------------------------------------------


def documented(arguments: dict[str, Any], num_queries: int, num_keys: int) -> Tensor:
    """What the documentation says is seen for these arguments, True = seen, written out pair by pair."""
    mask, mode = arguments.get("atten_mask"), arguments.get("sparse_mode", 0)
    if mask is None:
        return torch.ones(num_queries, num_keys, dtype=torch.bool)
    if mode == 1:
        return ~mask
    assert torch.equal(mask, torch.ones(2048, 2048, dtype=torch.bool).triu(1))
    before, after = {3: (num_keys, 0), 4: (arguments.get("pre_tockens"), arguments.get("next_tockens"))}[mode]
    last = num_keys - num_queries
    return torch.tensor(
        [[i + last - before <= j <= i + last + after for j in range(num_keys)] for i in range(num_queries)]
    )


@pytest.mark.parametrize(
    ("mask", "num_queries", "num_keys"),
    [
        (MaskSpec.dense(causal=False), 5, 5),
        (MaskSpec.dense(causal=False), 3, 8),
        (MaskSpec.dense(causal=True), 6, 6),
        (MaskSpec.dense(causal=True), 1, 9),
        (MaskSpec.dense(causal=True), 4, 9),
        (MaskSpec.dense(causal=True, window=1), 6, 6),
        (MaskSpec.dense(causal=True, window=3), 6, 6),
        (MaskSpec.dense(causal=True, window=3), 2, 9),
        (MaskSpec.dense(causal=True, window=100), 6, 6),
    ],
)
def test_dense_masks_keep_their_meaning(mask: MaskSpec, num_queries: int, num_keys: int) -> None:
    arguments, blind = lowering.dense_arguments(mask, num_queries, num_keys, CPU)
    expected = attend_mask(mask, num_queries, num_keys, CPU)
    expected = torch.ones(num_queries, num_keys, dtype=torch.bool) if expected is None else expected
    assert torch.equal(documented(arguments, num_queries, num_keys), expected)
    assert blind is None


@pytest.mark.parametrize(("num_queries", "window"), [(1, None), (6, None), (6, 2)])
def test_padded_keys_are_masked_in_full(num_queries: int, window: int | None) -> None:
    mask = MaskSpec.dense(causal=True, window=window, key_valid=torch.arange(6)[None, :] >= torch.tensor([[0], [2]]))
    arguments, blind = lowering.dense_arguments(mask, num_queries, 6, CPU)
    expected = attend_mask(mask, num_queries, 6, CPU)
    assert expected is not None
    assert blind is not None
    assert arguments["atten_mask"].shape == (2, 1, num_queries, 6)
    assert arguments["inner_precise"] == 2
    assert torch.equal(documented(arguments, num_queries, 6) & ~blind.transpose(1, 2), expected)


def test_no_row_of_a_mask_is_masked_as_a_whole() -> None:
    mask = MaskSpec.dense(causal=True, key_valid=torch.tensor([[False, False, True, True]]))
    arguments, blind = lowering.dense_arguments(mask, 4, 4, CPU)
    assert not bool(arguments["atten_mask"].all(-1).any())
    assert blind is not None
    assert blind[..., 0, 0].tolist() == [[True, True, False, False]]


def packed(lengths: Sequence[int], **changes: Any) -> MaskSpec:
    host = (0, *accumulate(lengths))
    return MaskSpec.packed(torch.tensor(host, dtype=torch.int32), host, causal=True, **changes)


def test_packed_samples_end_where_the_next_begins() -> None:
    assert lowering.sequence_groups(packed((3, 1, 4))) == [(slice(0, 8), [3, 4, 8])]


def test_empty_packed_samples_are_left_out() -> None:
    assert lowering.sequence_groups(packed((0, 3, 0, 4, 0))) == [(slice(0, 7), [3, 7])]


def test_more_samples_than_one_call_takes_are_parted() -> None:
    lengths = [1 + i % 3 for i in range(2500)]
    groups = lowering.sequence_groups(packed(lengths))
    assert [len(ends) for _, ends in groups] == [1024, 1024, 452]
    found = [b - a for _, ends in groups for a, b in pairwise((0, *ends))]
    assert found == lengths
    assert [tokens.start for tokens, _ in groups] == [0, *(tokens.stop for tokens, _ in groups[:-1])]
    assert groups[-1][0].stop == sum(lengths)


@pytest.mark.parametrize("window", [None, 1, 5])
def test_packed_masks_keep_their_meaning_within_a_sample(window: int | None) -> None:
    arguments = lowering.pattern(packed((7,), window=window), CPU)
    expected = attend_mask(MaskSpec.dense(causal=True, window=window), 7, 7, CPU)
    assert torch.equal(documented(arguments, 7, 7), expected)  # type: ignore[arg-type]


def test_packed_full_attention_has_no_mask() -> None:
    host = (0, 3, 7)
    mask = MaskSpec.packed(torch.tensor(host, dtype=torch.int32), host, causal=False)
    assert lowering.pattern(mask, CPU) == {}


def test_the_template_first_made_in_inference_can_still_be_saved_for_backward() -> None:
    lowering.template.cache_clear()
    with torch.inference_mode():
        first = lowering.template(CPU)
    assert not first.is_inference()
    assert lowering.template(CPU) is first
