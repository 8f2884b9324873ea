"""Some rows of a tensor on disk, in another order, as if they were a tensor of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Sliceable(Protocol):
    """A tensor of a file, or what stands for one: it is read as far as it is sliced."""

    @property
    def shape(self) -> torch.Size: ...

    def __getitem__(self, index: tuple[slice, ...], /) -> Tensor: ...


class Rows:
    """The rows `runs` of a matrix, one run after the other.

    Args:
        matrix: mapped from its file; only the rows that a slice asks for are touched.
        runs: ranges of its rows, none of them empty.
    """

    def __init__(self, matrix: Sliceable, runs: Sequence[range]) -> None:
        self._matrix = matrix
        self._runs = runs

    @property
    def shape(self) -> torch.Size:
        return torch.Size((sum(map(len, self._runs)), *self._matrix.shape[1:]))

    def __getitem__(self, index: tuple[slice, ...], /) -> Tensor:
        """A copy of some of the rows; a view of the file's where they are one run."""
        rows, *others = index
        start, end, step = rows.indices(self.shape[0])
        assert step == 1, step
        pieces, base = [], 0
        for run in self._runs:
            wanted = run[max(start - base, 0) : max(end - base, 0)]
            if wanted:
                pieces.append(self._matrix[(slice(wanted.start, wanted.stop), *others)])
            base += len(run)
        if not pieces:
            return self._matrix[(slice(0, 0), *others)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
