"""How the tokens of an optimizer step are weighted in its loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from llava_core.data.batch import Batch, Labelled

LossMode = Literal["token_mean", "micro_batch_mean", "sequence_mean"]


def label_weights(mode: LossMode, batches: Sequence[Batch], step: Labelled) -> list[Tensor]:
    """The weight of each label [K] fp32 of each micro-batch; over the whole step they sum to one.

    `step` counts what is labelled in the whole step, of which other processes may have some.

    `token_mean` weights every label alike, however the samples were split into micro-batches. `micro_batch_mean` is the
    mean of the micro-batches' own means, as the original LLaVA's trainer accumulates. `sequence_mean` weights every
    sample alike.
    """
    per_sample = [torch.tensor(batch.labels_per_sample, dtype=torch.float64) for batch in batches]
    if mode == "token_mean":
        total, shares = step.tokens, [torch.ones_like(counts) for counts in per_sample]
    elif mode == "micro_batch_mean":
        total, shares = step.batches, [torch.ones_like(counts) / counts.sum() for counts in per_sample]
    else:
        total, shares = step.samples, [1.0 / counts for counts in per_sample]
    weights = [share.repeat_interleave(counts.long()) for share, counts in zip(shares, per_sample, strict=True)]
    return [(w / total).float() for w in weights]
