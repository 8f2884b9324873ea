"""The chunked linear cross-entropy against its reference, whole and in chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llava_core.backend import CATALOGUE, KernelSpec, chunked_loss
from llava_core.backend.kernels import always
from llava_core.testing.kernels import max_errors

CPU = torch.device("cpu")
CHUNKED = KernelSpec(
    "linear_cross_entropy", "chunked", "llava_core.backend.chunked_loss:linear_cross_entropy", 10, always
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_logits", [chunked_loss.CHUNK_LOGITS, 211 * 8, 1], ids=["whole", "8 rows", "1 row"])
@pytest.mark.parametrize("case", CATALOGUE["linear_cross_entropy"].cases, ids=lambda case: case.name)
def test_the_chunked_loss_is_the_loss(
    case: Any, chunk_logits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_loss, "CHUNK_LOGITS", chunk_logits)
    for part in max_errors(CHUNKED, case, dtype, CPU):
        assert part.kernel_error <= 3.0 * part.reference_error + part.floor, part


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_the_chunked_loss_gives_no_gradient_to_what_is_frozen(frozen: str) -> None:
    hidden = torch.randn(5, 8, requires_grad=frozen != "hidden")
    weight = torch.randn(11, 8, requires_grad=frozen != "weight")
    loss = chunked_loss.linear_cross_entropy(hidden, weight, torch.arange(5), torch.rand(5))
    (2 * loss).backward()
    assert (hidden.grad is None, weight.grad is None) == (frozen == "hidden", frozen == "weight")


def test_the_chunked_loss_makes_no_gradient_where_none_is_wanted() -> None:
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    with torch.no_grad():
        assert not chunked_loss.linear_cross_entropy(hidden, weight, torch.arange(5), torch.rand(5)).requires_grad
