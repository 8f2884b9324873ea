"""The linear cross-entropy where each process has the output matrix' rows of its own words: no process ever has a whole
row of logits, and only three numbers a position are exchanged.

Shapes: K supervised positions, D width, V words of this process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup, ReduceOp

from llava_core.backend.chunked_loss import CHUNK_LOGITS
from llava_core.backend.reference import at_least_fp32


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, first_word: int, group: ProcessGroup
) -> Tensor:
    """The linear_cross_entropy op over the words of all processes of `group`; the same loss on each.

    Args:
        hidden: [K, D], as `targets` and `weights` the same on every process, and so is its gradient.
        weight: [V, D], the rows of words `first_word` … `first_word` + V − 1; may be fewer than another process has.
        targets: [K] ids in the whole vocabulary.
        weights: [K] fp32.
    """
    # Inside the function below gradients are always off, and it could not tell whether they are wanted.
    options = first_word, group, CHUNK_LOGITS, torch.is_grad_enabled()
    return _VocabularyLoss.apply(hidden, weight, targets, weights, *options)


class _VocabularyLoss(torch.autograd.Function):
    """As in the chunked loss of one process, gradients are made in the forward pass, where the logits are."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor,
        first_word: int,
        group: ProcessGroup,
        chunk_logits: int,
        grad_enabled: bool,
    ) -> Tensor:
        needs_hidden, needs_weight = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        wide = at_least_fp32(hidden.dtype)
        loss = hidden.new_zeros((), dtype=wide)
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        # In fp32 over the chunks: a sum in bf16 would round once a chunk.
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        num_rows = max(1, chunk_logits // weight.shape[0])
        for start in range(0, hidden.shape[0], num_rows):
            rows = slice(start, start + num_rows)
            logits = (hidden[rows] @ weight.T).to(wide)
            part, grad = _loss_and_gradient(logits, targets[rows] - first_word, weights[rows].to(wide), group)
            loss += part
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.T @ hidden[rows]
        if grad_hidden is not None:
            distributed.all_reduce(grad_hidden, group=group)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None if saved is None else saved * grad for saved in ctx.saved_tensors)
        return (*grads, None, None, None, None, None, None)


def _loss_and_gradient(logits: Tensor, targets: Tensor, weights: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """The weighted loss of some rows and its gradient by these words' logits, which takes the logits' memory.

    `targets` count from this process' first word, so that those of other processes lie outside of its words.
    """
    row = torch.arange(logits.shape[0], device=logits.device)
    mine = (targets >= 0) & (targets < logits.shape[1])
    column = targets.where(mine, 0)
    largest = logits.amax(dim=-1)
    distributed.all_reduce(largest, ReduceOp.MAX, group=group)
    logits = logits.sub_(largest[:, None])
    at_target = logits[row, column] * mine
    exponentials = logits.exp_()
    sums = torch.stack((exponentials.sum(dim=-1), at_target))
    distributed.all_reduce(sums, group=group)
    total, at_target = sums
    loss = ((total.log() - at_target) * weights).sum()
    grad = exponentials.mul_((weights / total)[:, None])  # weights · softmax
    grad[row, column] -= weights * mine
    return loss, grad
