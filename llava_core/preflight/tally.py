"""What all rows of a data set were found to be, a few bytes each."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llava_core.data.readers.index import IntArray
from llava_core.preflight.measure import ImageFacts, RowFacts, SampleFacts


class Tally:
    """The rows of one data set, or of several one after the other.

    Attributes:
        reasons: why rows cannot be used, and how many.
        num_dropped: usable rows that are too long and become no sample.
        image_reasons, image_modes, image_formats: how many images cannot be used and why; of those that can, which
            modes and formats they have in their files.
    """

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self.num_dropped = 0
        self.image_reasons: Counter[str] = Counter()
        self.image_modes: Counter[str] = Counter()
        self.image_formats: Counter[str] = Counter()
        self._verdicts = array("q")
        self._keys = array("Q")
        self._lengths = array("q")
        self._samples = array("q")
        self._image_sizes = array("q")

    def add(self, facts: RowFacts) -> None:
        """The next row."""
        if facts.rejected is not None:
            self.reasons[facts.rejected.reason] += 1
        elif not facts.samples:
            self.num_dropped += 1
        self._verdicts.append(-1 if facts.rejected else len(facts.samples))
        self._keys.append(facts.key)
        self._lengths.extend(facts.lengths)
        for sample in facts.samples:
            self._samples.extend(sample)
        for image in facts.images:
            if isinstance(image, ImageFacts):
                self._image_sizes.extend((image.width, image.height))
                self.image_modes[image.mode] += 1
                self.image_formats[image.format] += 1
            else:
                self.image_reasons[image] += 1

    @classmethod
    def joined(cls, tallies: Sequence[Tally]) -> Tally:
        """All rows of these."""
        whole = cls()
        for tally in tallies:
            whole.num_dropped += tally.num_dropped
            for name in ("reasons", "image_reasons", "image_modes", "image_formats"):
                getattr(whole, name).update(getattr(tally, name))
            for name in ("_verdicts", "_keys", "_lengths", "_samples", "_image_sizes"):
                getattr(whole, name).extend(getattr(tally, name))
        return whole

    @property
    def num_samples_of_rows(self) -> IntArray:
        """[N] int64: how many samples each row became; −1 of one that cannot be used."""
        return _numbers(self._verdicts)

    @property
    def keys(self) -> NDArray[np.uint64]:
        """[N] uint64: 64 bits of each row's id; 0 of one that has none of its own."""
        return np.frombuffer(self._keys, dtype=np.uint64) if self._keys else np.zeros(0, dtype=np.uint64)

    @property
    def lengths(self) -> IntArray:
        """[…] int64: tokens of each sequence of the usable rows, before any was cut."""
        return _numbers(self._lengths)

    @property
    def samples(self) -> IntArray:
        """[S, 4] int64: the columns of `SampleFacts`."""
        return _numbers(self._samples).reshape(-1, len(SampleFacts._fields))

    @property
    def image_sizes(self) -> IntArray:
        """[I, 2] int64: width and height of each image that can be used."""
        return _numbers(self._image_sizes).reshape(-1, 2)


def _numbers(values: array[int]) -> IntArray:
    return np.frombuffer(values, dtype=np.int64) if values else np.zeros(0, dtype=np.int64)
