"""Megatron's .bin and .idx, whose form `readers/megatron.py` tells.

Documents are written as megatron-core's builder writes those of `preprocess_data.py --append-eod`: one sequence each,
with the EOS as its last id. Conversations as Pai-Megatron-Patch's build_idxmap_sft_dataset.py packs them, one after the
other until the next one does not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
from safetensors import safe_open

from llava_core.data.prepare.parts import RowLog, put_file
from llava_core.data.prepare.tokens import BLOCK_BYTES, TokensTarget, blocks, id_type
from llava_core.data.readers import Reader
from llava_core.data.readers.index import IntArray
from llava_core.data.readers.megatron import HEADER, IGNORED, INTEGERS, MAGIC, VERSION
from llava_core.durable import FileDigest
from llava_core.errors import DataError


@dataclass(frozen=True)
class DocumentsTarget:
    """Documents, as `megatron` reads them.

    Attributes:
        rows: how they become ids.
        name: of the files, without the suffix.
    """

    rows: TokensTarget
    name: str
    parts_are_kept: bool = False

    @property
    def settings(self) -> Mapping[str, Any]:
        return {**self.rows.settings, "name": self.name}

    def check(self, reader: Reader) -> None:
        if reader.content != "texts":
            raise DataError(f"megatron holds documents, and this data set holds {reader.content}")

    def file_name(self, number: int) -> str:
        return self.rows.file_name(number)

    def chunks(self, reader: Reader, rows: range, log: RowLog, folder: Path) -> Iterator[bytes]:
        return self.rows.chunks(reader, rows, log, folder)

    def finish(self, folder: Path, parts: list[Path]) -> dict[str, FileDigest]:
        return _write_pair(folder, self.name, id_type(self.rows.tokenizer), partial(_documents, parts))


@dataclass(frozen=True)
class ConversationsTarget:
    """Conversations without images, as `megatron_sft` reads them.

    Attributes:
        rows: how they become ids; it cuts longer ones to `max_length`.
        name: of the files, without the suffix.
        pad_id: fills what is left of a row.
    """

    rows: TokensTarget
    name: str
    max_length: int
    pad_id: int
    parts_are_kept: bool = False

    @property
    def settings(self) -> Mapping[str, Any]:
        return {**self.rows.settings, "name": self.name, "max_length": self.max_length, "pad_id": self.pad_id}

    def check(self, reader: Reader) -> None:
        if reader.content != "conversations":
            raise DataError(f"megatron_sft holds conversations, and this data set holds {reader.content}")

    def file_name(self, number: int) -> str:
        return self.rows.file_name(number)

    def chunks(self, reader: Reader, rows: range, log: RowLog, folder: Path) -> Iterator[bytes]:
        return self.rows.chunks(reader, rows, log, folder)

    def finish(self, folder: Path, parts: list[Path]) -> dict[str, FileDigest]:
        packed = partial(_packed, parts, self.max_length, self.pad_id)
        return _write_pair(folder, self.name, np.dtype("<i4"), packed)  # an unsigned type has no −100


def _documents(parts: list[Path], lengths: IO[bytes]) -> Iterator[bytes]:
    """The ids of all documents; how many each has goes to `lengths`."""
    for path in parts:
        with safe_open(path, framework="numpy") as part:
            counts = np.diff(part.get_tensor("token_bounds"))
            lengths.write(counts[counts > 0].astype("<i4").tobytes())  # a row that cannot be used has none
            tokens = part.get_slice("tokens")
            (total,) = tokens.get_shape()
            for start in range(0, total, BLOCK_BYTES):
                yield tokens[start : min(start + BLOCK_BYTES, total)].tobytes()


def _packed(parts: list[Path], max_length: int, pad_id: int, lengths: IO[bytes]) -> Iterator[bytes]:
    """Rows of `max_length` ids and as many labels."""
    waiting: list[tuple[IntArray, IntArray]] = []
    room = max_length
    for ids, supervised in _conversations(parts):
        if ids.size > room:
            yield _row(waiting, room, pad_id, lengths)
            waiting, room = [], max_length
        labels = np.full(ids.size, IGNORED)
        labels[:-1][supervised[1:]] = ids[1:][supervised[1:]]
        waiting.append((np.append(ids[:-1], -1 - ids[-1]), labels))
        room -= ids.size
    if waiting:
        yield _row(waiting, room, pad_id, lengths)


def _row(waiting: list[tuple[IntArray, IntArray]], room: int, pad_id: int, lengths: IO[bytes]) -> bytes:
    ids = [ids for ids, _ in waiting] + [np.full(room, pad_id)]
    labels = [labels for _, labels in waiting] + [np.full(room, IGNORED)]
    row = np.concatenate(ids + labels).astype("<i4")
    lengths.write(np.array(row.size, dtype="<i4").tobytes())
    return row.tobytes()


def _conversations(parts: list[Path]) -> Iterator[tuple[IntArray, np.ndarray[Any, Any]]]:
    for path in parts:
        with safe_open(path, framework="numpy") as part:
            tokens, supervised = part.get_slice("tokens"), part.get_slice("supervised")
            bounds = part.get_tensor("token_bounds").tolist()
            for start, end in pairwise(bounds):
                if start < end:
                    yield tokens[start:end].astype(np.int64), supervised[start:end]


def _write_pair(
    folder: Path, name: str, dtype: np.dtype[Any], ids: Callable[[IO[bytes]], Iterator[bytes]]
) -> dict[str, FileDigest]:
    """The .bin, of what `ids` gives, and the .idx, of the lengths that it tells. Raises DataError if there are none."""
    with TemporaryFile(dir=folder) as lengths:
        files = {f"{name}.bin": put_file(folder / f"{name}.bin", ids(lengths))}
        count = lengths.tell() // 4
        if not count:
            raise DataError("none of the rows can be used, so that there is nothing to write")
        index = _index(dtype, lengths, count)
        files[f"{name}.idx"] = put_file(folder / f"{name}.idx", index)
    return files


def _index(dtype: np.dtype[Any], lengths: IO[bytes], count: int) -> Iterator[bytes]:
    """An .idx of documents of one sequence each."""
    code = next(code for code, kind in INTEGERS.items() if np.dtype(kind) == dtype)
    yield HEADER.pack(MAGIC, VERSION, code, count, count + 1)
    yield from blocks(lengths)
    start = 0
    for block in blocks(lengths):
        ends = start + np.cumsum(np.frombuffer(block, dtype="<i4"), dtype=np.int64) * dtype.itemsize
        yield np.append(start, ends[:-1]).astype("<i8").tobytes()
        start = int(ends[-1])
    step = BLOCK_BYTES // 8
    for first in range(0, count + 1, step):
        yield np.arange(first, min(first + step, count + 1), dtype="<i8").tobytes()
