"""How many rows of each source an epoch takes, and which: a pure function of the seed, as the order is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from llava_core.data.readers.index import IntArray
from llava_core.data.sampler import Order
from llava_core.errors import ConfigError


class Mixture:
    """The rows of each epoch, as many as the sources have together.

    Without weights each row of each source is taken once. With them, each source has its share of an epoch: a row of a
    small source may be taken several times, and a large one takes several epochs to be seen whole. After each epoch
    every row of a source was taken as often as any other, or once more; within an epoch that takes the last rows of
    one pass and the first of the next, the order decides which come first.

    Args:
        lengths: of each source, in rows.
        weights: shares of each epoch, of any sum; None for every row once.

    Raises:
        ConfigError: a weight so small that an epoch has no row for it.
    """

    def __init__(self, lengths: Sequence[int], weights: Sequence[float] | None, order: Order, seed: int) -> None:
        self.lengths, self.order, self.seed = tuple(lengths), order, seed
        self.counts = None if weights is None else _apportion(sum(lengths), weights)
        if self.counts is not None and 0 in self.counts:
            number = self.counts.index(0)
            assert weights is not None
            raise ConfigError(
                f"data.sources.{number}.weight = {weights[number]}: an epoch of {sum(lengths)} rows has none for it; "
                "raise it, or leave the source out."
            )

    @property
    def num_rows(self) -> int:
        """Of an epoch."""
        return sum(self.lengths)

    def rows(self, epoch: int) -> IntArray:
        """The indices of an epoch's rows: [N] int64, source by source; sources alternate if the order is sequential."""
        if self.counts is None:
            return np.arange(self.num_rows, dtype=np.int64)
        starts = np.cumsum([0, *self.lengths[:-1]])
        parts = [self._taken(source, epoch) + starts[source] for source in range(len(self.lengths))]
        rows = np.concatenate(parts)
        return rows[_alternating(self.counts)] if self.order == "sequential" else rows

    def _taken(self, source: int, epoch: int) -> IntArray:
        """Rows of one source, counted within it: the epoch's stretch of one permutation after the other."""
        assert self.counts is not None
        length, count = self.lengths[source], self.counts[source]
        first = epoch * count
        passes = range(first // length, (first + count - 1) // length + 1)
        rows = np.concatenate([self._pass(source, number) for number in passes])
        start = first - passes[0] * length
        return rows[start : start + count]

    def _pass(self, source: int, number: int) -> IntArray:
        """All rows of a source once."""
        length = self.lengths[source]
        if self.order == "sequential":
            return np.arange(length, dtype=np.int64)
        (state,) = np.random.SeedSequence((self.seed, source, number)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state >> 1))  # torch takes 63 bits
        permutation: IntArray = torch.randperm(length, generator=generator).numpy()
        return permutation


def _apportion(total: int, weights: Sequence[float]) -> list[int]:
    """`total` in proportion to the weights: rounded down, and what is left to the largest remainders (Hamilton)."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _alternating(counts: Sequence[int]) -> IntArray:
    """The order in which the sources' rows, given one source after the other, are spread evenly over an epoch."""
    times = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    order: IntArray = np.argsort(times, kind="stable")
    return order
