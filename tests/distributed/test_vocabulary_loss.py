"""The loss over a vocabulary that processes share is cross-entropy.

Judged in float64 against torch's own cross-entropy of all logits, where sums in another order differ by 1e-15.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llava_core.backend import chunked_loss
from llava_core.engine.vocabulary_loss import linear_cross_entropy
from tests.distributed.processes import run_processes

WIDTH, WORDS = 16, 30
Result = tuple[Tensor, Tensor | None, Tensor | None]


def inputs(num_labels: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, the whole output matrix, targets and their weights."""
    generator = torch.Generator().manual_seed(0)
    hidden = scale * torch.randn(num_labels, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(WORDS, WIDTH, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, WORDS, (num_labels,), generator=generator)
    return hidden, weight, targets, torch.rand(num_labels, generator=generator)


def expected(num_labels: int, scale: float = 1.0) -> Result:
    hidden, weight, targets, weights = inputs(num_labels, scale)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = 3 * (F.cross_entropy(hidden @ weight.T, targets, reduction="none") * weights).sum()
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (distributed.get_world_size(),))


def shared(
    num_labels: int,
    bounds: tuple[int, ...],
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
    chunk_logits: int | None = None,
    learn_words: bool = True,
) -> Result:
    """On this process, which has the words between its two `bounds`."""
    if chunk_logits is not None:
        chunked_loss.CHUNK_LOGITS = chunk_logits  # in a process of this test alone
    hidden, weight, targets, weights = inputs(num_labels, scale)
    rank = distributed.get_rank()
    first, end = bounds[rank : rank + 2]
    hidden, shard = hidden.to(dtype).requires_grad_(), weight[first:end].to(dtype).requires_grad_(learn_words)
    most_words = max(b - a for a, b in pairwise(bounds))
    loss = 3 * linear_cross_entropy(hidden, shard, targets, weights, first, most_words, mesh())
    loss.backward()
    return loss.detach(), hidden.grad, shard.grad


def check(results: list[Result], wanted: Result, tolerance: float) -> None:
    loss, hidden_grad, weight_grad = wanted
    for found_loss, found_hidden_grad, _ in results:
        torch.testing.assert_close(found_loss.double(), loss, rtol=tolerance, atol=0)
        torch.testing.assert_close(found_hidden_grad.double(), hidden_grad, rtol=0, atol=tolerance)
    joined = torch.cat([grad for _, _, grad in results])
    torch.testing.assert_close(joined.double(), weight_grad, rtol=0, atol=tolerance)


@pytest.mark.parametrize("bounds", [(0, 15, 30), (0, 16, 30), (0, 8, 16, 24, 30)])
def test_it_is_cross_entropy(bounds: tuple[int, ...]) -> None:
    check(run_processes(len(bounds) - 1, shared, 37, bounds), expected(37), 1e-12)


@pytest.mark.parametrize("bounds", [(0, 15, 30), (0, 16, 30)])
def test_a_few_rows_at_a_time(bounds: tuple[int, ...]) -> None:
    # 60 logits: 4 rows of 15 words, so that 37 rows take ten rounds, the last of one row; of 16 words 3 rows, and as
    # many where there are 14 words, of which 4 rows would fit.
    check(run_processes(2, shared, 37, bounds, 1.0, torch.float64, 60), expected(37), 1e-12)


def test_logits_whose_exponentials_overflow() -> None:
    check(run_processes(2, shared, 9, (0, 15, 30), 1e4), expected(9, 1e4), 1e-10)


def test_without_labels_the_loss_is_zero_and_has_gradients() -> None:
    for loss, hidden_grad, weight_grad in run_processes(2, shared, 0, (0, 15, 30)):
        assert loss == 0
        assert hidden_grad.shape == (0, WIDTH)
        assert torch.equal(weight_grad, torch.zeros(15, WIDTH, dtype=torch.float64))


def test_frozen_words_get_no_gradient() -> None:
    loss, hidden_grad, _ = expected(5)
    for found, found_hidden_grad, weight_grad in run_processes(
        2, shared, 5, (0, 15, 30), 1.0, torch.float64, None, False
    ):
        assert weight_grad is None
        torch.testing.assert_close((found, found_hidden_grad), (loss, hidden_grad), rtol=1e-12, atol=1e-12)


def test_sums_are_fp32_where_activations_are_not() -> None:
    results = run_processes(2, shared, 37, (0, 15, 30), 1.0, torch.bfloat16)
    assert {loss.dtype for loss, _, _ in results} == {torch.float32}
    # Inputs, logits and gradients are rounded to bf16; the largest, near 10, to steps of 1/16.
    check(results, expected(37), 0.2)


def loss_alone() -> Tensor:
    hidden, weight, targets, weights = inputs(11)
    first = 15 * distributed.get_rank()
    with torch.no_grad():
        return linear_cross_entropy(
            hidden.requires_grad_(), weight[first : first + 15].requires_grad_(), targets, weights, first, 15, mesh()
        )


def test_without_gradients() -> None:
    for loss in run_processes(2, loss_alone):
        assert not loss.requires_grad
        torch.testing.assert_close(3 * loss, expected(11)[0])
