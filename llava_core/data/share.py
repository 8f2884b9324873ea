"""Which of a step's samples each process takes, and what the processes tell each other of theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from llava_core.data.batch import Counts, Labelled
from llava_core.data.examples import Rejected
from llava_core.errors import DataError

T = TypeVar("T")


def alone(value: T) -> list[T]:
    """What a process hears that is the only one."""
    return [value]


@dataclass(frozen=True)
class Share:
    """A process's place among those that each take samples of their own.

    Processes with the same index take the same samples: they share one model's work.

    Attributes:
        index, count: which share, of how many.
        gather: from a value of this process to those of all processes, in one order.
        writes: whether this process is the one that writes files.
    """

    index: int = 0
    count: int = 1
    gather: Callable[[Any], list[Any]] = alone
    writes: bool = True

    def of(self, num_rows: int, step_size: int, chunk: int) -> NDArray[np.bool_]:
        """Which of the rows of consecutive steps are this share's: [N] bool.

        Chunks are dealt one each, forwards and backwards in turn: where a step is sorted by length, as in a grouped
        order, no share gets the longer chunk each time. A chunk, a padded micro-batch, stays whole.
        """
        chunks = np.arange(num_rows) % step_size // chunk
        rounds, places = np.divmod(chunks, self.count)
        taken: NDArray[np.bool_] = np.where(rounds % 2, self.count - 1 - places, places) == self.index
        return taken


MOST_NAMED = 5
"""Rows in a message."""

WHOLE = Share()
"""Of a process that is the only one."""


@dataclass(frozen=True)
class News:
    """What a process tells of its share of a step.

    Attributes:
        counts, labelled: of its micro-batches.
        num_batches: how many they are.
        num_good, num_overlong: rows that could be used, and those of them that were longer than a sample may be.
        rejected: rows that could not be used.
    """

    index: int
    counts: Counts
    labelled: Labelled
    num_batches: int
    num_good: int
    num_overlong: int
    rejected: tuple[Rejected, ...]


def exchange(share: Share, own: News) -> list[News]:
    """One for each share, by its index.

    Raises:
        DataError: processes that share one model's work could not read the same rows; in every process.
    """
    heard: dict[int, News] = {}
    for news in share.gather(own):
        other = heard.setdefault(news.index, news)
        if replace(news, rejected=other.rejected) != other:
            apart = sorted({f"{row.id}: {row.message}" for row in {*news.rejected} ^ {*other.rejected}})
            raise DataError(
                "processes that must read the same rows do not find the same in them; is a file missing on one of "
                f"their machines? Rows that one alone could not use: {'; '.join(apart[:MOST_NAMED]) or 'none'}."
            )
    return [heard[index] for index in sorted(heard)]
