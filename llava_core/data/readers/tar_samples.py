"""Samples in tar files: consecutive members whose names differ in their suffix alone, as webdataset writes them."""

from __future__ import annotations

import io
import re
import tarfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from llava_core.data.readers.index import (
    KEPT_FROM_BYTES,
    IntArray,
    check_unchanged,
    describe_files,
    kept_index,
    open_data,
)
from llava_core.errors import BadRow, DataError

NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
"""A sample's key, which ends at the first dot of the file's name, and the member's suffix."""

META = re.compile(r"__[^/]*__($|/)")
"""Members that webdataset keeps for itself."""

BLOCK = 512
MAX_SAMPLE_BYTES = 1 << 28
"""A longer sample is set aside: it would take a worker gigabytes."""


@dataclass(frozen=True)
class TarSample:
    """One sample. `members` holds what each file contains by its suffix in lower case, in the tar's order."""

    key: str
    members: Mapping[str, bytes]


class TarSamples:
    """The samples of several tar files, by their number.

    Args:
        shards: the files.
        names: what each is called in messages and exclusions.
        excluded: samples to leave out, as `<name>/<key>`.

    Raises:
        DataError: no shards, or one that is missing, compressed, cut short, or no tar file.
    """

    def __init__(
        self, shards: Sequence[Path], names: Sequence[str], index_folder: Path | None, excluded: Sequence[str] = ()
    ) -> None:
        self.shards, self.names = tuple(shards), tuple(names)
        self._index = kept_index(
            index_folder,
            "samples",
            shards,
            lambda: _index_shards(self.shards, self.names, frozenset(excluded)),
            min_bytes=KEPT_FROM_BYTES,
            left_out=excluded,
        )
        self._sizes = tuple(shard.stat().st_size for shard in shards)

    def __len__(self) -> int:
        return self._index.shape[1]

    def describe(self, path: Path) -> dict[str, str | int]:
        """See `describe_files`."""
        return describe_files(path, self.shards, self._sizes, len(self))

    def counts(self) -> list[int]:
        """Samples of each shard."""
        return np.bincount(self._index[0], minlength=len(self.shards)).tolist()

    def place(self, index: int) -> str:
        """The sample's shard, for messages."""
        return str(self.shards[int(self._index[0, index])])

    def read(self, index: int) -> TarSample:
        """One sample.

        Raises:
            BadRow: `row_too_large`, or `malformed_row` for two members of one suffix.
            DataError: the shard changed.
        """
        number, start, size = (int(value) for value in self._index[:, index])
        with open_data(self.shards[number]) as file:
            check_unchanged(self.shards[number], self._sizes[number], file.seek(0, 2))
            if size > MAX_SAMPLE_BYTES:
                raise BadRow(
                    "row_too_large",
                    f"row {index} has {size} bytes, the limit is {MAX_SAMPLE_BYTES}: make it smaller",
                )
            file.seek(start)
            content = file.read(size)
        try:
            return _unpack(content, f"row {index} of {self.place(index)}")
        except tarfile.TarError as error:
            raise DataError(
                f"{self.place(index)} changed while in use: row {index} is no sample any more: {error}; "
                "start again with files that nothing writes to"
            ) from error


def _unpack(content: bytes, where: str) -> TarSample:
    """The one sample of a piece of a tar file. Raises BadRow and, where that is no sample, tarfile.TarError."""
    members: dict[str, bytes] = {}
    key = ""
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        for member in tar:
            if (named := _named(member)) is None:
                continue
            key, suffix = named
            if suffix in members:
                raise BadRow("malformed_row", f"{where}: {key} has two members .{suffix}")
            opened = tar.extractfile(member)
            assert opened is not None  # of a regular file
            members[suffix] = opened.read()
    if not members:
        raise tarfile.ReadError("no members")
    return TarSample(key, members)


def _index_shards(shards: Sequence[Path], names: Sequence[str], excluded: frozenset[str]) -> IntArray:
    """[3, N] int64: the shard, the first byte and the size of each sample."""
    columns = [array("q"), array("q"), array("q")]
    for number, (shard, name) in enumerate(zip(shards, names, strict=True)):
        for key, start, end in _read_shard(shard):
            if f"{name}/{key}" not in excluded:
                for column, value in zip(columns, (number, start, end - start), strict=True):
                    column.append(value)
    return np.array(columns, dtype=np.int64)


def _read_shard(path: Path) -> Iterator[tuple[str, int, int]]:
    """Key, first byte and end of each sample. Raises DataError."""
    with open_data(path) as file:
        if not file.peek(1):
            raise DataError(f"{path} is empty; check that it was written to its end")
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                yield from _samples(tar)
                _check_end(path, file, tar.offset)
        except tarfile.TarError as error:
            raise DataError(
                f"{path} cannot be read as a tar file: {error}; copy it again if it was cut short, or unpack it if it "
                "is compressed, for rows are read from anywhere in it"
            ) from error


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, int, int]]:
    """Key, first byte and end of each run of members with one key."""
    current: str | None = None
    start = end = 0
    for member in tar:
        tar.members = []  # type: ignore[attr-defined]  # it would keep all that it has seen
        named = _named(member)
        if named is None:
            continue
        if named[0] != current:
            if current is not None:
                yield current, start, end
            current, start = named[0], member.offset
        end = member.offset_data + -(-member.size // BLOCK) * BLOCK
    if current is not None:
        yield current, start, end


def _named(member: tarfile.TarInfo) -> tuple[str, str] | None:
    """The key and the suffix of a member, if it belongs to a sample."""
    found = NAME.fullmatch(member.name)
    if not member.isreg() or META.search(member.name) or found is None:
        return None
    return found[1], found[2].lower()


def _check_end(path: Path, file: BinaryIO, end: int) -> None:
    """A tar file ends with two blocks of zeros: without them it was cut short between two members, and what follows
    them would be left out in silence."""
    file.seek(end)
    rest = file.read(2 * BLOCK)
    if len(rest) < BLOCK or rest.strip(b"\x00"):
        raise DataError(f"{path} lacks the end mark of a tar file: it was cut short, copy it again")
    while block := file.read(1 << 20):
        if block.strip(b"\x00"):
            raise DataError(f"{path} goes on after its end mark: tar files that were joined must be joined with tar -A")
