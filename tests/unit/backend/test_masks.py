"""MaskSpec and its lowering to a bool mask and to SDPA, against loops that apply the definition word by word."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llava_core.backend import MaskFacts, MaskSpec, sdpa
from llava_core.backend.reference import attend_mask, attention

CPU = torch.device("cpu")


def packed(lengths: list[int], *, causal: bool, window: int | None = None) -> MaskSpec:
    host = (0, *accumulate(lengths))
    return MaskSpec.packed(torch.tensor(host, dtype=torch.int32), host, causal=causal, window=window)


def may_attend(mask: MaskSpec, row: int, query: int, key: int, num_queries: int, num_keys: int) -> bool:
    """The definition in MaskSpec's docstring, one pair at a time."""
    position = query + num_keys - num_queries
    if mask.causal and key > position:
        return False
    if mask.window is not None and key <= position - mask.window:
        return False
    if mask.key_valid is not None and not bool(mask.key_valid[row, key]):
        return False
    if mask.cu_seqlens_host is not None:
        starts = mask.cu_seqlens_host
        sample = [next(s for s in range(len(starts) - 1) if starts[s] <= x < starts[s + 1]) for x in (query, key)]
        return sample[0] == sample[1]
    return True


def brute_force(mask: MaskSpec, rows: int, num_queries: int, num_keys: int) -> Tensor:
    return torch.tensor(
        [
            [[may_attend(mask, b, i, j, num_queries, num_keys) for j in range(num_keys)] for i in range(num_queries)]
            for b in range(rows)
        ]
    )


@st.composite
def specs(draw: st.DrawFn) -> tuple[MaskSpec, int, int, int]:
    """A mask with its rows, queries and keys: packed or dense, windowed, padded, of unequal lengths."""
    causal = draw(st.booleans())
    window = draw(st.none() | st.integers(1, 9)) if causal else None
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=4).filter(any))
        return packed(lengths, causal=causal, window=window), 1, sum(lengths), sum(lengths)
    rows, queries, keys = draw(st.integers(1, 3)), draw(st.integers(1, 8)), draw(st.integers(1, 8))
    valid = None
    if draw(st.booleans()):
        valid = torch.tensor(draw(st.lists(st.booleans(), min_size=rows * keys, max_size=rows * keys)))
        valid = valid.view(rows, keys)
    return MaskSpec.dense(causal=causal, window=window, key_valid=valid), rows, queries, keys


@given(specs())
def test_attend_mask_is_the_definition(case: tuple[MaskSpec, int, int, int]) -> None:
    mask, rows, queries, keys = case
    allowed = attend_mask(mask, queries, keys, CPU)
    expected = brute_force(mask, rows, queries, keys)
    if allowed is None:
        assert bool(expected.all())
        return
    assert allowed.shape[-2:] == (queries, keys)
    whole = allowed.squeeze(1) if allowed.dim() == 4 else allowed
    assert torch.equal(whole.expand(rows, -1, -1), expected)


def by_hand(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """Attention query by query over the keys that it may see; zeros where there are none."""
    out = torch.zeros_like(q)
    groups = q.shape[2] // k.shape[2]
    for b, i, n in ((b, i, n) for b in range(q.shape[0]) for i in range(q.shape[1]) for n in range(q.shape[2])):
        seen = allowed[b, i]
        if bool(seen.any()):
            keys, values = k[b, seen, n // groups], v[b, seen, n // groups]
            out[b, i, n] = torch.softmax(keys @ q[b, i, n] * scale, dim=0) @ values
    return out


@pytest.mark.parametrize("lowering", [attention, sdpa.attention], ids=["reference", "sdpa"])
@given(case=specs())
def test_attention_sees_just_those_keys(lowering, case: tuple[MaskSpec, int, int, int]) -> None:
    mask, rows, queries, keys = case
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(rows, queries, 4, 8, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(rows, keys, 2, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = by_hand(q, k, v, brute_force(mask, rows, queries, keys), 0.3)
    # Float64 leaves 1e-15 of rounding; 1e-12 is room for sums in another order.
    torch.testing.assert_close(lowering(q, k, v, mask, 0.3), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lowering", [attention, sdpa.attention], ids=["reference", "sdpa"])
def test_a_query_that_sees_nothing_has_finite_gradients(lowering) -> None:
    """Left-padded prompts have such queries; a NaN there would reach every weight."""
    valid = torch.tensor([[False, False, True, True], [True, True, True, True]])
    mask = MaskSpec.dense(causal=True, key_valid=valid)
    q, k, v = (torch.randn(2, 4, 2, 8, requires_grad=True) for _ in range(3))
    out = lowering(q, k, v, mask, 0.3)
    assert torch.equal(out[0, :2], torch.zeros(2, 2, 8))
    out.square().sum().backward()
    assert all(bool(x.grad.isfinite().all()) for x in (q, k, v))


def test_fully_masked_rows_of_the_mask_are_all_false() -> None:
    mask = MaskSpec.dense(causal=True, key_valid=torch.tensor([[False, True, True]]))
    allowed = attend_mask(mask, 3, 3, CPU)
    assert allowed is not None
    assert allowed[0, 0].tolist() == [[False] * 3, [False, True, False], [False, True, True]]


def test_more_queries_than_keys_leave_the_first_queries_blind() -> None:
    allowed = attend_mask(MaskSpec.dense(causal=True), 3, 2, CPU)
    assert allowed is not None
    assert allowed.tolist() == [[False, False], [True, False], [True, True]]


def test_full_attention_has_no_mask() -> None:
    assert attend_mask(MaskSpec.dense(causal=False), 5, 7, CPU) is None


def test_facts_name_the_kind() -> None:
    assert packed([3, 4], causal=True, window=2).facts() == MaskFacts(packed=True, causal=True, window=2)
    padded = MaskSpec.dense(causal=True, key_valid=torch.ones(1, 3, dtype=torch.bool))
    assert padded.facts(unequal_lengths=True) == MaskFacts(
        packed=False, causal=True, key_padding=True, unequal_lengths=True
    )
    assert MaskSpec.dense(causal=False).facts() == MaskFacts(packed=False, causal=False)


def test_lengths_are_the_differences_of_the_offsets() -> None:
    assert packed([3, 0, 4], causal=True).lengths == (3, 0, 4)


@pytest.mark.parametrize(("lengths", "common"), [([4, 4, 4], 4), ([4], 4), ([4, 3], None)])
def test_uniform_length_is_the_common_one(lengths: list[int], common: int | None) -> None:
    assert packed(lengths, causal=True).uniform_length == common


def test_moving_keeps_everything_else() -> None:
    mask = packed([3, 4], causal=True, window=2)
    moved = mask.to(torch.device("meta"))
    assert moved.cu_seqlens is not None
    assert moved.cu_seqlens.device.type == "meta"
    assert moved.key_valid is None
    assert (moved.cu_seqlens_host, moved.causal, moved.window) == (mask.cu_seqlens_host, True, 2)


def test_contradictions_are_our_own_bugs() -> None:
    offsets = torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(AssertionError, match="both offsets"):
        MaskSpec(causal=True, cu_seqlens=offsets)
    with pytest.raises(AssertionError, match="only defined for causal"):
        MaskSpec.dense(causal=False, window=3)
    with pytest.raises(AssertionError, match="no padded keys"):
        MaskSpec(True, None, offsets, (0, 3), torch.ones(1, 3, dtype=torch.bool))
