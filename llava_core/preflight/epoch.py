"""The micro-batches of a run's first epoch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llava_core.data.loader import Batching
from llava_core.data.readers.index import IntArray
from llava_core.data.share import Share


@dataclass(frozen=True)
class Epoch:
    """The micro-batches of an epoch, over all data-parallel processes.

    Attributes:
        num_tokens: of text and images.
        num_positions: what is computed: those and the padding.
        num_micro_batches: those without samples included, which keep processes in step.
        room: tokens that the micro-batches could hold.
    """

    steps: int
    samples: int
    num_tokens: int
    num_positions: int
    num_micro_batches: int
    room: int


class EpochReplay:
    """Goes through an epoch as the loader does, on the lengths alone.

    Args:
        num_samples_of_rows: [N] of every row of the data; −1 of one that cannot be used.
        lengths: [S] of every sample, in the order of the rows.
        num_shares: data-parallel processes.
        most_tokens: of a micro-batch.
    """

    def __init__(
        self, num_samples_of_rows: IntArray, lengths: IntArray, batching: Batching, num_shares: int, most_tokens: int
    ) -> None:
        self._counts = np.maximum(num_samples_of_rows, 0)
        self._starts = np.cumsum(self._counts) - self._counts
        self._lengths = lengths
        self._batching, self._num_shares, self._most_tokens = batching, num_shares, most_tokens

    def run(self, rows: IntArray) -> Epoch:
        """The epoch of these rows, in their order."""
        size, chunk = self._batching.global_size, self._batching.chunk
        shares = [Share(i, self._num_shares).of(len(rows), size, chunk) for i in range(self._num_shares)]
        samples = tokens = positions = num_batches = 0
        for start in range(0, len(rows), size):
            step = slice(start, start + size)
            lengths = [self._lengths_of(rows[step][share[step]]) for share in shares]
            step_positions, step_batches = self._micro_batches(lengths)
            samples += sum(map(len, lengths))
            tokens += sum(map(sum, lengths))
            positions += step_positions
            num_batches += step_batches
        steps = -(-len(rows) // size)
        return Epoch(steps, samples, tokens, positions, num_batches, num_batches * self._most_tokens)

    def _lengths_of(self, rows: IntArray) -> list[int]:
        """Of the samples of these rows."""
        spans = [self._lengths[self._starts[row] : self._starts[row] + self._counts[row]] for row in rows]
        return np.concatenate(spans).tolist() if spans else []

    def _micro_batches(self, lengths: list[list[int]]) -> tuple[int, int]:
        """The positions and the micro-batches of a step, whose processes have samples of these lengths."""
        batching = self._batching
        packed = batching.groups_of_all(lengths)
        most = max(map(len, packed))
        if not most:
            return 0, 0
        each = batching.num_batches(most)
        positions = sum(
            batching.num_positions([[own[i] for i in group] for group in groups], each)
            for own, groups in zip(lengths, packed, strict=True)
        )
        return positions, each * len(lengths)
