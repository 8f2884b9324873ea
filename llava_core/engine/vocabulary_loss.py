"""The linear cross-entropy where each process has the output matrix' rows of its own words: no process ever has a whole
row of logits, and only three numbers a position are exchanged.

Shapes: K supervised positions, D width, V words of this process.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup, ReduceOp
from torch.distributed.device_mesh import DeviceMesh

from llava_core.backend.chunked_loss import chunked_loss, rows_at_once
from llava_core.engine.exchange import add_gradients


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    first_word: int,
    most_words: int,
    mesh: DeviceMesh,
) -> Tensor:
    """The linear_cross_entropy op over the words of all processes of `mesh`, which has one axis; the same loss on each.

    Args:
        hidden: [K, D], as `targets` and `weights` the same on every process, and so is its gradient.
        weight: [V, D], the rows of words `first_word` … `first_word` + V − 1.
        most_words: of any process, so that all take equally many positions at a time.
        targets: [K] ids in the whole vocabulary.
        weights: [K] fp32.
    """
    own_words = partial(shared_rows, group=mesh.get_group())
    hidden, targets = add_gradients(hidden, mesh), targets - first_word
    return chunked_loss(hidden, weight, targets, weights, own_words, rows_at_once(most_words))


def shared_rows(
    logits: Tensor, targets: Tensor, weights: Tensor, needs_gradient: bool, *, group: ProcessGroup
) -> tuple[Tensor, Tensor | None]:
    """The `RowLoss` of the cross-entropy where each process has the logits of its own words.

    Args:
        targets: counted from this process's first word, so that those of other processes lie outside of its words.
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
    if not needs_gradient:
        return loss, None
    grad = exponentials.mul_((weights / total)[:, None])  # weights · softmax
    grad[row, column] -= weights * mine
    return loss, grad
