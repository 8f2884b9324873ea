"""The linear cross-entropy a few rows at a time, so that all logits never exist at once.

Shapes: K supervised positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llava_core.backend.reference import at_least_fp32

CHUNK_LOGITS = 2**27
"""Logits that exist at once: 0.5 GiB in fp32, and still 1,024 rows a matmul at a vocabulary of 128k."""


RowLoss: TypeAlias = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]
"""From the logits [K, V] of some rows in fp32, their targets and weights [K], and whether a gradient is needed: their
weighted loss, and its gradient by the logits, which may take the logits' memory."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The linear_cross_entropy op."""
    return chunked_loss(hidden, weight, targets, weights, whole_rows, rows_at_once(weight.shape[0]))


def rows_at_once(num_words: int) -> int:
    """Of how many rows the logits of so many words may exist at once."""
    return max(1, CHUNK_LOGITS // num_words)


def chunked_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, row_loss: RowLoss, num_rows: int
) -> Tensor:
    """The sum of `row_loss` over rows [K, D], multiplied by `weight` [V, D], `num_rows` at a time."""
    # Inside the function below gradients are always off, and it could not tell whether they are wanted.
    return _ChunkedLoss.apply(hidden, weight, targets, weights, row_loss, num_rows, torch.is_grad_enabled())


class _ChunkedLoss(torch.autograd.Function):
    """Gradients are made in the forward pass, where the logits are: the loss is a scalar, so all that backward adds is
    a factor. No logits are kept or computed twice, and nothing is read back to the host."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor,
        row_loss: RowLoss,
        num_rows: int,
        grad_enabled: bool,
    ) -> Tensor:
        needs_hidden, needs_weight = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        wide = at_least_fp32(hidden.dtype)
        loss = hidden.new_zeros((), dtype=wide)
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = None
        for start in range(0, hidden.shape[0], num_rows):
            rows = slice(start, start + num_rows)
            logits = (hidden[rows] @ weight.T).to(wide)
            part, grad = row_loss(logits, targets[rows], weights[rows].to(wide), needs_hidden or needs_weight)
            loss += part
            if grad_hidden is not None and grad is not None:
                grad_hidden[rows] = grad.to(hidden.dtype) @ weight
            if needs_weight and grad is not None:
                product = grad.to(hidden.dtype).T @ hidden[rows]
                # From the second chunk on in fp32: a sum in bf16 would round once a chunk.
                grad_weight = product if grad_weight is None else grad_weight.to(wide).add_(product)
        if needs_weight:
            grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight.to(weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None if saved is None else saved * grad for saved in ctx.saved_tensors)
        return (*grads, None, None, None, None, None)


def whole_rows(logits: Tensor, targets: Tensor, weights: Tensor, needs_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """The `RowLoss` of the cross-entropy where logits of all words are there."""
    row = torch.arange(logits.shape[0], device=logits.device)
    log_total = logits.logsumexp(dim=-1)
    loss = ((log_total - logits[row, targets]) * weights).sum()
    if not needs_gradient:
        return loss, None
    grad = logits.sub_(log_total[:, None]).exp_().mul_(weights[:, None])  # weights · softmax
    grad[row, targets] -= weights
    return loss, grad
