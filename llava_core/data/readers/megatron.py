"""Megatron's data sets of token ids: `NAME.bin` holds the ids of all sequences, `NAME.idx` where each of them is.

The format is that of megatron-core's `datasets/indexed_dataset.py`, read here without Megatron. All numbers are
little-endian. The index: 9 bytes of magic, a version (u64), the ids' type (u8), the numbers S of sequences and D of
document bounds (u64 each); then S lengths (i32), S byte positions in the .bin (i64), and D bounds (i64), of which two
in succession are a document's first sequence and the next document's.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llava_core.data.overlong import Overlong
from llava_core.data.readers import Content, prefixed
from llava_core.data.readers.index import IntArray, check_unchanged, open_data
from llava_core.data.readers.json_rows import MAX_ROW_BYTES
from llava_core.data.records import TokenRow, TokenSequence
from llava_core.errors import BadRow, DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
VERSION = 1
INTEGERS: Mapping[int, str] = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
FLOATS: Mapping[int, str] = {6: "float64", 7: "float32"}
IGNORED = -100


class MegatronReader:
    """Documents of token ids, to be learnt whole. See `Reader`.

    Args:
        path: the .idx, the .bin, or what their names have in common.

    Raises:
        DataError: a file that is missing, cut short, of another format, or that does not belong to the other.
    """

    content: Content = "tokens"
    usual_overlong: Overlong = "split"

    def __init__(self, path: Path) -> None:
        prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
        self.path, self._bin_path = prefixed(prefix, ".idx"), prefixed(prefix, ".bin")
        self.type, num_sequences, num_bounds = _read_header(self.path)
        mapped = np.memmap(self.path, mode="r", dtype=np.uint8)
        self._lengths = _column(mapped, HEADER.size, "<i4", num_sequences)
        self._starts = _column(mapped, HEADER.size + 4 * num_sequences, "<i8", num_sequences)
        self._bounds = _column(mapped, HEADER.size + 12 * num_sequences, "<i8", num_bounds)
        self.num_bytes = self._check_size()

    def __reduce__(self) -> tuple[Callable[[Path], MegatronReader], tuple[Path]]:
        return type(self), (self.path,)  # a mapped file would be pickled with all that is in it

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @property
    def fingerprint(self) -> Mapping[str, str | int]:
        """`path`, `num_bytes` of the .bin, `num_rows` and `num_sequences`."""
        rows, sequences = len(self), len(self._lengths)
        return {"path": str(self.path), "num_bytes": self.num_bytes, "num_rows": rows, "num_sequences": sequences}

    def read(self, index: int) -> TokenRow:
        """Row `index`. See `Reader.read`; reasons `empty_document`, `row_too_large`, `malformed_row`."""
        ids = self._read_ids(index)
        return TokenRow(f"row-{index}", index, (TokenSequence(ids, np.ones(ids.size, dtype=np.bool_)),))

    def _read_ids(self, index: int) -> IntArray:
        """The ids of all sequences of a document."""
        first, end = int(self._bounds[index]), int(self._bounds[index + 1])
        if not 0 <= first <= end <= len(self._lengths):
            raise BadRow("malformed_row", f"row {index} of {self.path} has the sequences {first} to {end}")
        lengths = self._lengths[first:end].astype(np.int64)
        size, start = int(lengths.sum()) * self.type.itemsize, int(self._starts[first]) if first < end else 0
        if not size:
            raise BadRow("empty_document", f"row {index} of {self.path} has no tokens")
        if size > MAX_ROW_BYTES:
            raise BadRow("row_too_large", f"row {index} has {size} bytes, the limit is {MAX_ROW_BYTES}: split it")
        expected = start + np.cumsum([0, *lengths[:-1]]) * self.type.itemsize
        in_file = 0 <= start <= self.num_bytes - size
        if not in_file or lengths.min() < 0 or not np.array_equal(self._starts[first:end], expected):
            raise BadRow("malformed_row", f"row {index} of {self.path}: its sequences do not lie one after the other")
        with open_data(self._bin_path) as file:
            check_unchanged(self._bin_path, self.num_bytes, file.seek(0, 2))
            file.seek(start)
            return np.frombuffer(file.read(size), dtype=self.type).astype(np.int64)

    def _check_size(self) -> int:
        """The .bin's bytes, which must be as many as the index says; nothing of it is read."""
        with open_data(self._bin_path) as file:
            num_bytes = file.seek(0, 2)
        expected = int(self._starts[-1]) + int(self._lengths[-1]) * self.type.itemsize
        if num_bytes != expected:
            raise DataError(
                f"{self._bin_path} has {num_bytes} bytes and {self.path} tells of {expected}: one of them was cut "
                "short or is another data set's; copy both again"
            )
        if self._bounds[0] != 0 or self._bounds[-1] != len(self._lengths):
            raise DataError(
                f"{self.path}: its documents are the sequences {self._bounds[0]} to {self._bounds[-1]}, and it has "
                f"0 to {len(self._lengths)}: make it anew"
            )
        return num_bytes


class MegatronSftReader(MegatronReader):
    """Conversations that Pai-Megatron-Patch tokenised and packed. See `Reader`.

    Source of the form: its build_idxmap_sft_dataset.py. A row is as many labels as ids, in that order. The last id of
    each conversation is kept as −1 − id; a label is the id that follows, or −100; padding comes last.

    Raises:
        DataError: as `MegatronReader`, and for ids of a type that cannot be negative.
    """

    usual_overlong: Overlong = "truncate"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        if self.type.kind == "u":
            raise DataError(
                f"{self.path} keeps ids as {self.type.name}, which cannot hold the labels −100 of packed "
                "conversations: for documents choose the reader megatron, else make the data anew as int32"
            )

    def read(self, index: int) -> TokenRow:
        """Row `index`. See `Reader.read`; reasons those of documents."""
        ids_and_labels = self._read_ids(index)
        ids, labels = np.split(ids_and_labels, [ids_and_labels.size // 2])
        ends = np.flatnonzero(ids < 0) + 1
        last = int(ends[-1]) if ends.size else 0
        if ids.size != labels.size or not last or (labels[last:] != IGNORED).any():
            raise self._malformed(index, "is not ids with a last one of each conversation, then as many labels")
        ids = np.where(ids < 0, -1 - ids, ids)
        sequences = zip(np.split(ids[:last], ends[:-1]), np.split(labels[:last], ends[:-1]), strict=True)
        return TokenRow(f"row-{index}", index, tuple(self._sequence(index, *sequence) for sequence in sequences))

    def _sequence(self, index: int, ids: IntArray, labels: IntArray) -> TokenSequence:
        learnt = labels != IGNORED
        if learnt[-1] or (labels[:-1] != ids[1:])[learnt[:-1]].any():
            raise self._malformed(index, "has a label that is not the id that follows")
        return TokenSequence(ids, np.concatenate([[False], learnt[:-1]]))

    def _malformed(self, index: int, problem: str) -> BadRow:
        return BadRow("malformed_row", f"row {index} of {self.path} {problem}; documents have the reader megatron")


def _read_header(path: Path) -> tuple[np.dtype[np.integer], int, int]:
    """The ids' type and the numbers of sequences and of document bounds, which must be what the file has room for."""
    with open_data(path) as file:
        header, num_bytes = file.read(HEADER.size), file.seek(0, 2)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise DataError(f"{path} is no index of a Megatron data set: it starts with {header[:9]!r}, not {MAGIC!r}")
    _, version, code, num_sequences, num_bounds = HEADER.unpack(header)
    if version != VERSION:
        raise DataError(f"{path} has version {version}, expected {VERSION}")
    if code not in INTEGERS:
        raise DataError(f"{path}: its ids are of type {FLOATS.get(code, code)}, expected whole numbers")
    expected = HEADER.size + 12 * num_sequences + 8 * num_bounds
    if num_bytes == expected + num_sequences != expected:
        raise DataError(f"{path} is of a multimodal data set, whose images are in a form of its own; expected text")
    if num_bytes != expected:
        raise DataError(f"{path} has {num_bytes} bytes and tells of {expected}: it was cut short, copy it again")
    if num_sequences == 0 or num_bounds < 2:
        raise DataError(f"{path} holds no rows; check that it is the file you mean and was written to its end")
    return np.dtype(INTEGERS[code]), num_sequences, num_bounds


def _column(mapped: NDArray[np.uint8], start: int, kind: str, count: int) -> NDArray[np.integer]:
    dtype = np.dtype(kind)
    return mapped[start : start + count * dtype.itemsize].view(dtype)
