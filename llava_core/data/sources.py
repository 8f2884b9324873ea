"""The sources of a run's data as one data set: every row of every source has an index."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from llava_core.data.conversation import Template
from llava_core.data.image_store import ImageStore
from llava_core.data.readers import Reader
from llava_core.data.readers.index import IntArray
from llava_core.errors import DataError


@dataclass(frozen=True)
class Source:
    """One data set.

    Attributes:
        template: None where the rows are token ids.
        images: where the rows' images are found; None where the model sees none.
        rows: which of the reader's rows it has; None for all.
    """

    reader: Reader
    template: Template | None
    images: ImageStore | None = None
    rows: IntArray | None = None

    @property
    def num_rows(self) -> int:
        return len(self.reader) if self.rows is None else len(self.rows)


class Place(NamedTuple):
    """A row: of which source, counted from 0, and which of its reader's rows."""

    source: int
    row: int


class Sources:
    """Sources one after the other.

    Args:
        name: of them together, for the message.

    Raises:
        DataError: a source without rows.
    """

    def __init__(self, sources: Sequence[Source], name: str = "the data") -> None:
        self.sources = tuple(sources)
        self.lengths = tuple(source.num_rows for source in sources)
        if not all(self.lengths):
            number = self.lengths.index(0)
            path = self.sources[number].reader.fingerprint.get("path", "")
            raise DataError(
                f"source {number} of {name}, {path}, has no rows; check that it is the file you mean and was written "
                "to its end"
            )
        self._starts = [0, *accumulate(self.lengths)]

    def __len__(self) -> int:
        return self._starts[-1]

    def find(self, index: int) -> Place:
        """Which row has this index."""
        number = bisect_right(self._starts, index) - 1
        row, rows = index - self._starts[number], self.sources[number].rows
        return Place(number, row if rows is None else int(rows[row]))

    @property
    def fingerprint(self) -> list[Mapping[str, str | int]]:
        """What each reader names its data by."""
        return [dict(source.reader.fingerprint) for source in self.sources]
