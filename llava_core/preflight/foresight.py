"""Whether bad rows would stop a run, and where: they are counted over its epochs as the run counts them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llava_core.data.quarantine import too_many
from llava_core.data.readers.index import IntArray

MOST_EPOCHS = 20
"""How many are gone through. Where every epoch has every row and their share exceeds the limit, ten are enough: each
adds a bad row at least, and ten bad ones stop a run. What is left is a share below the limit that the order of a late
epoch exceeds for some steps, and rows of a small weight, which come rarely."""


@dataclass(frozen=True)
class Stop:
    """The step in which a run ends for its bad rows.

    Attributes:
        epoch, step: of the run, both from 1.
    """

    epoch: int
    step: int


@dataclass(frozen=True)
class Foresight:
    """How bad rows end a run.

    Attributes:
        stop: None where they do not, as far as it was gone through.
        whole: whether that was to its end; else it was MOST_EPOCHS.
    """

    stop: Stop | None
    whole: bool


@dataclass(frozen=True)
class Rows:
    """What a run counts of each row of its data.

    Attributes:
        is_bad: [N] int64: 1 of a row that cannot be used, 0 of others.
        tokens: [N] int64: of its samples together.
    """

    is_bad: IntArray
    tokens: IntArray

    @classmethod
    def of(cls, num_samples_of_rows: IntArray, lengths: IntArray) -> Rows:
        """From each row's number of samples, −1 of one that cannot be used, and each sample's length, in that order."""
        counts = np.maximum(num_samples_of_rows, 0)
        ends, sums = np.cumsum(counts), np.concatenate([[0], np.cumsum(lengths)])
        return cls((num_samples_of_rows < 0).astype(np.int64), sums[ends] - sums[ends - counts])


def foresee(
    rows: Rows,
    order: Callable[[int], IntArray],
    global_size: int,
    max_fraction: float,
    is_over: Callable[[int, int], bool],
) -> Foresight:
    """Go through a run's steps, up to its end or for MOST_EPOCHS.

    Args:
        order: the rows of an epoch in their order, by its number from 0.
        global_size: rows of a step.
        max_fraction: of bad rows among all that were met.
        is_over: whether so many steps, which had so many tokens, are the whole run.
    """
    if not rows.is_bad.any():
        return Foresight(None, whole=True)
    steps = tokens = bad = met = 0
    for epoch in range(MOST_EPOCHS):
        taken = order(epoch)
        starts = np.arange(0, len(taken), global_size)
        sizes = np.diff(starts, append=len(taken)).tolist()
        bad_of_steps = np.add.reduceat(rows.is_bad[taken], starts).tolist()
        tokens_of_steps = np.add.reduceat(rows.tokens[taken], starts).tolist()
        for size, more_bad, more_tokens in zip(sizes, bad_of_steps, tokens_of_steps, strict=True):
            if is_over(steps, tokens):
                return Foresight(None, whole=True)
            steps, tokens, bad, met = steps + 1, tokens + more_tokens, bad + more_bad, met + size
            if too_many(bad, met, max_fraction):
                return Foresight(Stop(epoch + 1, steps), whole=True)
    return Foresight(None, whole=is_over(steps, tokens))
