"""npu_fusion_attention against the plain formula in float64."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch_npu
from compare import BF16_TOLERANCE, FP32_TOLERANCE, check_against_float64
from torch import Tensor

B, N, G, D = 2, 4, 2, 16
SCALE = D**-0.5


def compressed() -> Tensor:
    return torch.ones(2048, 2048, dtype=torch.bool).triu(1).npu()


def formula(q: Tensor, k: Tensor, v: Tensor, masked: Tensor | None) -> Tensor:
    """[B, N, S, D] each, `masked` True where a pair is left out."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * SCALE
    if masked is not None:
        scores = scores.masked_fill(masked, -torch.inf)
    return scores.softmax(-1) @ v


def causal(num_queries: int, num_keys: int, shift: int) -> Tensor:
    return torch.arange(num_keys)[None, :] > torch.arange(num_queries)[:, None] + shift


def band(num_queries: int, num_keys: int, before: int, after: int) -> Tensor:
    """Around the diagonal that ends at the bottom right."""
    diagonal = torch.arange(num_queries)[:, None] + num_keys - num_queries
    key = torch.arange(num_keys)[None, :]
    return (key > diagonal + after) | (key < diagonal - before)


def to_layout(x: Tensor, layout: str) -> Tensor:
    return {
        "BNSD": x,
        "BSND": x.transpose(1, 2),
        "BSH": x.transpose(1, 2).flatten(2),
        "SBH": x.permute(2, 0, 1, 3).flatten(2),
    }[layout].contiguous()


def from_layout(x: Tensor, layout: str) -> Tensor:
    if layout == "BNSD":
        return x
    if layout == "SBH":
        return x.unflatten(-1, (N, -1)).permute(1, 2, 0, 3)
    return (x if layout == "BSND" else x.unflatten(-1, (N, -1))).transpose(1, 2)


def check_dense(
    layout: str, num_queries: int, num_keys: int, masked: Tensor | None, dtype: torch.dtype, **arguments: Any
) -> None:
    def op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tensors = [to_layout(x, layout) for x in (q, k, v)]
        return from_layout(torch_npu.npu_fusion_attention(*tensors, N, layout, scale=SCALE, **arguments)[0], layout)

    shapes = (B, N, num_queries, D), (B, G, num_keys, D), (B, G, num_keys, D)
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    tolerance = FP32_TOLERANCE if dtype == torch.float32 else 2 * BF16_TOLERANCE
    check_against_float64(op, lambda q, k, v: formula(q, k, v, masked), inputs, tolerance)


@pytest.mark.parametrize("layout", ["BNSD", "BSND", "BSH", "SBH"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_in_each_layout(layout: str, dtype: torch.dtype) -> None:
    check_dense(layout, 12, 12, causal(12, 12, 0), dtype, atten_mask=compressed(), sparse_mode=2)


def test_without_a_mask_attention_is_full_whatever_the_mode() -> None:
    for mode in (0, 2, 3):
        check_dense("BSND", 12, 12, None, torch.float32, sparse_mode=mode, pre_tockens=1, next_tockens=0)


def test_mode_2_is_aligned_at_the_top_left_and_mode_3_at_the_bottom_right() -> None:
    check_dense("BSND", 5, 9, causal(5, 9, 0), torch.float32, atten_mask=compressed(), sparse_mode=2)
    check_dense("BSND", 5, 9, causal(5, 9, 4), torch.float32, atten_mask=compressed(), sparse_mode=3)


def test_mode_4_is_a_band_at_the_bottom_right() -> None:
    arguments = {"atten_mask": compressed(), "sparse_mode": 4, "pre_tockens": 3, "next_tockens": 0}
    check_dense("BSND", 12, 12, band(12, 12, 3, 0), torch.float32, **arguments)
    check_dense("BSND", 5, 12, band(5, 12, 3, 0), torch.float32, **arguments)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8])
def test_mode_1_takes_a_whole_mask(mask_dtype: torch.dtype) -> None:
    padded = torch.zeros(B, 1, 12, 12, dtype=torch.bool)
    padded[1, :, :, 8:] = True
    masked = padded | causal(12, 12, 0)
    check_dense("BSND", 12, 12, masked, torch.float32, atten_mask=masked.to(mask_dtype).npu(), sparse_mode=1)


def test_mode_0_takes_a_whole_mask_that_agrees_with_the_window() -> None:
    masked = causal(12, 12, 0) | (torch.arange(12)[None, :] < torch.arange(12)[:, None] - 3)
    arguments = {"atten_mask": masked.npu(), "pre_tockens": 3, "next_tockens": 0}
    check_dense("BNSD", 12, 12, masked, torch.float32, **arguments)


def test_each_head_may_have_its_own_mask() -> None:
    masked = torch.rand(B, N, 6, 6) < 0.4
    masked[..., 0] = False
    check_dense("BNSD", 6, 6, masked, torch.float32, atten_mask=masked.npu(), sparse_mode=1)


def packed_formula(q: Tensor, k: Tensor, v: Tensor, ends: Sequence[int], window: int | None) -> Tensor:
    outputs = []
    for start, end in pairwise((0, *ends)):
        own = [x[start:end].transpose(0, 1)[None] for x in (q, k, v)]
        masked = band(end - start, end - start, window or end, 0)
        outputs.append(formula(*own, masked)[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("mode", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_sequences_attend_within_themselves(mode: int, dtype: torch.dtype) -> None:
    ends, window = [3, 10, 11, 16], 2 if mode == 4 else None

    def op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        band_arguments = {"pre_tockens": window, "next_tockens": 0} if window else {}
        return torch_npu.npu_fusion_attention(
            *(q, k, v, N, "TND"),
            **(band_arguments | {"scale": SCALE, "atten_mask": compressed(), "sparse_mode": mode}),
            actual_seq_qlen=ends,
            actual_seq_kvlen=ends,
        )[0]

    inputs = [torch.randn(16, heads, D).to(dtype) for heads in (N, G, G)]
    tolerance = FP32_TOLERANCE if dtype == torch.float32 else 2 * BF16_TOLERANCE
    check_against_float64(op, lambda q, k, v: packed_formula(q, k, v, ends, window), inputs, tolerance)


def test_a_value_may_be_narrower_than_a_key() -> None:
    def op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch_npu.npu_fusion_attention(q, k, v, N, "BNSD", scale=SCALE)[0]

    inputs = [torch.randn(B, N, 6, D), torch.randn(B, N, 6, D), torch.randn(B, N, 6, D // 2)]
    check_against_float64(op, lambda q, k, v: formula(q, k, v, None), inputs, FP32_TOLERANCE)


def test_the_statistics_are_the_softmax_maximum_and_sum() -> None:
    q, k, v = (torch.randn(B, N, 6, D) for _ in range(3))
    _, maximum, total, *_ = torch_npu.npu_fusion_attention(q.npu(), k.npu(), v.npu(), N, "BNSD", scale=SCALE)
    scores = q @ k.mT * SCALE
    assert maximum.shape == total.shape == (B, N, 6, 8)
    assert maximum.dtype == total.dtype == torch.float32
    torch.testing.assert_close(maximum[..., 0].cpu(), scores.amax(-1))
    torch.testing.assert_close((maximum + total.log())[..., 5].cpu(), scores.logsumexp(-1))


def test_a_row_without_keys_is_unspecified_and_gives_no_gradient() -> None:
    masked = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    masked[..., 0, :] = True
    q, k, v = (torch.randn(1, 1, 4, D).npu().requires_grad_() for _ in range(3))
    output = torch_npu.npu_fusion_attention(
        q, k, v, 1, "BNSD", atten_mask=masked.npu(), sparse_mode=1, inner_precise=2, scale=SCALE
    )[0]
    assert bool(output[0, 0, 0].isnan().all())
    assert not bool(output[0, 0, 1:].isnan().any())
    output[:, :, 1:].sum().backward()
    assert bool((q.grad[0, 0, 0] == 0).all())
    assert not any(bool(x.grad.isnan().any()) for x in (q, k, v))
