"""What npu_fusion_attention's documentation does not allow must raise, and say which rule was broken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_npu
from ascend_simulator.contract import ContractError
from torch import Tensor

N, D = 2, 16
TRIU = torch.ones(2048, 2048, dtype=torch.bool).triu(1)


def attend(
    num_queries: int = 6, num_keys: int = 6, layout: str = "BNSD", heads: int = N, dtype: Any = None, **arguments: Any
) -> Tensor:
    def build(length: int) -> Tensor:
        shape = (length, N, D) if layout == "TND" else (1, N, length, D)
        return torch.randn(shape, dtype=dtype).npu()

    arguments = {name: x.npu() if isinstance(x, Tensor) else x for name, x in arguments.items()}
    inputs = build(num_queries), build(num_keys), build(num_keys)
    return torch_npu.npu_fusion_attention(*inputs, heads, layout, **arguments)[0]


def packed(ends: list[int] | None, key_ends: list[int] | None = None, **arguments: Any) -> Tensor:
    key_ends = key_ends or ends
    num_keys = key_ends[-1] if key_ends else 6
    arguments = {"atten_mask": TRIU, "sparse_mode": 3} | arguments
    return attend(6, num_keys, "TND", actual_seq_qlen=ends, actual_seq_kvlen=key_ends, **arguments)


def test_the_calls_that_are_bent_here_are_right_when_straight() -> None:
    assert attend(atten_mask=TRIU, sparse_mode=2).shape == (1, N, 6, D)
    assert packed([2, 6]).shape == (6, N, D)


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"atten_mask": TRIU.float(), "sparse_mode": 2}, "atten_mask is bool, uint8"),
        ({"atten_mask": 2 * TRIU.to(torch.uint8), "sparse_mode": 2}, "0 \\(kept\\) and 1 \\(masked\\)"),
        ({"atten_mask": ~TRIU, "sparse_mode": 2}, "triu\\(1\\)"),
        ({"atten_mask": TRIU[:6, :6], "sparse_mode": 2}, "compressed mask of 2048"),
        ({"atten_mask": TRIU[:6, :6], "sparse_mode": 3}, "compressed mask of 2048"),
        ({"atten_mask": TRIU[:6, :6], "sparse_mode": 4}, "compressed mask of 2048"),
        ({"atten_mask": TRIU, "sparse_mode": 1}, "atten_mask is \\[6, 6\\]"),
        ({"atten_mask": TRIU[None, None, :6, :6].expand(3, 1, 6, 6), "sparse_mode": 1}, "atten_mask is"),
        ({"atten_mask": TRIU[None, None, :6, :6].expand(1, 2, 6, 6)[0], "sparse_mode": 1}, "atten_mask is"),
        ({"atten_mask": TRIU[:6, :6], "next_tockens": 0, "pre_tockens": 2}, "must agree"),
        ({"atten_mask": TRIU, "sparse_mode": 4, "pre_tockens": 2, "next_tockens": -3}, "leave a band"),
        ({"atten_mask": TRIU, "sparse_mode": 6}, "0 to 4"),
        ({"atten_mask": TRIU, "sparse_mode": 2, "inner_precise": 3}, "inner_precise"),
        ({"atten_mask": torch.ones(6, 6, dtype=torch.bool), "sparse_mode": 1}, "inner_precise=2"),
        ({"padding_mask": TRIU[:6, :6]}, "not supported"),
        ({"keep_prob": 0.9}, "dropout"),
        ({"softmax_layout": "TND"}, "softmax_layout"),
        ({"layout": "NBSD"}, "input_layout"),
        ({"heads": 3}, "head_num heads"),
        ({"heads": 0}, "1 to 256"),
        ({"dtype": torch.int32}, "query is float16"),
    ],
)
def test_refused(arguments: dict[str, Any], rule: str) -> None:
    if arguments.get("dtype") == torch.int32:
        x = torch.ones(1, N, 6, D, dtype=torch.int32).npu()
        with pytest.raises(ContractError, match=rule):
            torch_npu.npu_fusion_attention(x, x, x, N, "BNSD")
        return
    with pytest.raises((ContractError, RuntimeError), match=rule):
        attend(**arguments)


@pytest.mark.parametrize(
    ("ends", "key_ends", "arguments", "rule"),
    [
        (None, None, {}, "needs actual_seq_qlen"),
        ([0, 2, 6], None, {}, "not with 0"),
        ([2, 4], [2, 4], {}, "ends with T = 6"),
        ([4, 2, 6], None, {}, "cumulative"),
        ([2, 6], [6], {}, "as many query as key"),
        ([6], [3], {}, "TND forbids rows"),
        ([2, 6], None, {"atten_mask": TRIU[:3, :3], "sparse_mode": 1}, "longest query"),
        ([2, 6], None, {"atten_mask": torch.ones(4, 4, dtype=torch.bool), "sparse_mode": 1}, "TND forbids rows"),
    ],
)
def test_packed_refused(ends: Any, key_ends: Any, arguments: dict[str, Any], rule: str) -> None:
    with pytest.raises((ContractError, RuntimeError), match=rule):
        packed(ends, key_ends, **arguments)


@pytest.mark.parametrize(
    ("q", "k", "v", "rule"),
    [
        ((1, 2, 6, 16), (1, 2, 6, 8), (1, 2, 6, 8), "Dq = Dk"),
        ((1, 2, 6, 8), (1, 2, 6, 8), (1, 2, 6, 16), "Dq = Dk"),
        ((1, 2, 6, 776), (1, 2, 6, 776), (1, 2, 6, 776), "1 to 768"),
        ((1, 3, 6, 8), (1, 2, 6, 8), (1, 2, 6, 8), "multiple"),
        ((1, 2, 6, 8), (1, 2, 6, 8), (1, 2, 5, 8), "same heads and length"),
        ((2, 2, 6, 8), (1, 2, 6, 8), (1, 2, 6, 8), "one B"),
    ],
)
def test_shapes_refused(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], rule: str) -> None:
    with pytest.raises((ContractError, RuntimeError), match=rule):
        torch_npu.npu_fusion_attention(*(torch.randn(shape).npu() for shape in (q, k, v)), q[1], "BNSD")


def test_mixed_dtypes_and_float64_refused() -> None:
    x = torch.randn(1, N, 6, D).npu()
    with pytest.raises(ContractError, match="one dtype"):
        torch_npu.npu_fusion_attention(x, x.half(), x.half(), N, "BNSD")
    with pytest.raises(ContractError, match="float64"):
        torch_npu.npu_fusion_attention(x.double(), x.double(), x.double(), N, "BNSD")


def test_a_misspelt_argument_is_refused_by_the_schema() -> None:
    with pytest.raises(RuntimeError, match="pre_tokens"):
        attend(pre_tokens=3)
