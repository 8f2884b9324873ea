"""Rows of JSON: one list of them in a file, or one a line. Each is found by its bytes and parsed when it is read."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Mapping
from json.decoder import JSONDecodeError
from pathlib import Path
from typing import BinaryIO

import numpy as np

from llava_core.data.readers.index import KEPT_FROM_BYTES, IntArray, check_unchanged, kept_index, open_data
from llava_core.data.records import Record
from llava_core.errors import BadRow, DataError

BOM = b"\xef\xbb\xbf"
WHITESPACE = re.compile(r"[ \t\r\n]*")
BLOCK_BYTES = 1 << 20
MAX_ROW_BYTES = 1 << 26
"""A longer row is set aside: as token ids it would take a worker gigabytes."""

MAX_COUNTED_BYTES = 1 << 24
"""Up to where lines are counted: a large file may have many bad rows, and each would cost a pass over it."""


class FileRows:
    """Rows of a file by their byte offsets. See `Reader`.

    Args:
        index: [2, N] int64: where each row starts, and its size in bytes.
    """

    def __init__(self, path: Path, index: IntArray) -> None:
        if not index.shape[1]:
            raise DataError(f"{path} holds no rows; check that it is the file you mean and was written to its end")
        self.path = path
        self.num_bytes = path.stat().st_size
        self._starts, self._sizes = index

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def fingerprint(self) -> Mapping[str, str | int]:
        """`path`, `num_bytes` and `num_rows`."""
        return {"path": str(self.path), "num_bytes": self.num_bytes, "num_rows": len(self)}

    def read_bytes(self, index: int) -> bytes:
        """What row `index` holds.

        Raises:
            BadRow: `row_too_large`.
            DataError: the file changed.
        """
        start, size = int(self._starts[index]), int(self._sizes[index])
        with open_data(self.path) as file:
            check_unchanged(self.path, self.num_bytes, file.seek(0, 2))
            if size > MAX_ROW_BYTES:
                raise BadRow("row_too_large", f"row {index} has {size} bytes, the limit is {MAX_ROW_BYTES}: split it")
            file.seek(start)
            return file.read(size)

    def place(self, index: int) -> str:
        """The row's line and file, for messages; far from the start its first byte, which needs nothing read."""
        start = int(self._starts[index])
        if start > MAX_COUNTED_BYTES:
            return f"byte {start} of {self.path}"
        with open_data(self.path) as file:
            return f"line {_line_number(file, start)} of {self.path}"


class JsonRows(FileRows):
    """Rows of JSON in a file. See `Reader`.

    Args:
        parse: from a row's value and its index to its record.
    """

    def __init__(self, path: Path, index: IntArray, parse: Callable[[object, int], Record]) -> None:
        super().__init__(path, index)
        self._parse = parse

    def read(self, index: int) -> Record:
        """Row `index`. See `Reader.read`; reasons `malformed_json`, `row_too_large` and those of the parser."""
        content = self.read_bytes(index)
        try:
            row = json.loads(content.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise BadRow("malformed_json", f"row {index} ({self.place(index)}): {error}") from error
        return self._parse(row, index)


def json_index(path: Path, index_folder: Path | None, *, lines: bool | None = None) -> IntArray:
    """Where a file's rows of JSON are.

    Args:
        lines: whether each line is a row; None to see whether the file starts with a list.

    Raises:
        DataError: missing; or a list with a mistake, with the path, line and column.
    """
    if lines is None:
        lines = _first_byte(path) != b"["
    build, kind = (index_lines, "lines") if lines else (index_json_list, "list")
    return kept_index(index_folder, kind, [path], lambda: build(path), min_bytes=KEPT_FROM_BYTES)


def index_lines(path: Path) -> IntArray:
    """The lines of a file that are not blank: [2, N] int64, starts and sizes."""
    starts, sizes, position, start, blank = array("q"), array("q"), 0, 0, True
    with open_data(path) as file:
        while piece := file.readline(BLOCK_BYTES):  # in pieces: a file without line breaks may be larger than memory
            if position == 0 and piece.startswith(BOM):
                start, piece = len(BOM), piece[len(BOM) :]
                position = start
            blank = blank and not piece.strip()
            position += len(piece)
            if piece.endswith(b"\n") or not file.peek(1):
                if not blank:
                    starts.append(start)
                    sizes.append(position - start)
                start, blank = position, True
    return np.array([starts, sizes], dtype=np.int64)


def index_json_list(path: Path) -> IntArray:
    """The elements of the JSON list that a file holds; each is parsed, to find its end, and dropped.

    Returns:
        [2, N] int64, starts and sizes.

    Raises:
        DataError: with the path, line and column of what is not JSON.
    """
    with open_data(path) as file:
        # Latin-1 maps each byte to one character, so that the positions are byte offsets and nothing is larger in
        # memory than on disk. JSON's own characters are ASCII, and strings are decoded for good when they are read.
        text = file.read().decode("latin-1")
    starts, sizes, decoder = array("q"), array("q"), json.JSONDecoder()
    position = _skip(text, len(BOM) if text.startswith(BOM.decode("latin-1")) else 0)
    if text[position : position + 1] != "[":
        raise _not_a_list(path, text, position)
    position = _skip(text, position + 1)
    closed = text[position : position + 1] == "]"
    while not closed:
        try:
            _, end = decoder.raw_decode(text, position)
        except JSONDecodeError as error:
            raise _syntax_error(path, text, error.pos, len(starts), error.msg) from error
        except (ValueError, RecursionError) as error:  # a number of over 4300 digits; nested without end
            raise _syntax_error(path, text, position, len(starts), str(error)) from error
        starts.append(position)
        sizes.append(end - position)
        position = _skip(text, end)
        closed = text[position : position + 1] == "]"
        if not closed and text[position : position + 1] != ",":
            raise _syntax_error(path, text, position, len(starts), "expected ',' or ']' after a row")
        if not closed:
            position = _skip(text, position + 1)
    if _skip(text, position + 1) != len(text):
        raise _syntax_error(path, text, _skip(text, position + 1), len(starts), "there is more after the list's end")
    return np.array([starts, sizes], dtype=np.int64)


def _first_byte(path: Path) -> bytes:
    """The first that is neither white space nor part of a byte order mark."""
    with open_data(path) as file:
        while block := file.read(BLOCK_BYTES):
            if found := block.removeprefix(BOM).lstrip():
                return found[:1]
    return b""


def _skip(text: str, position: int) -> int:
    match = WHITESPACE.match(text, position)
    assert match is not None  # it matches the empty string
    return match.end()


def _not_a_list(path: Path, text: str, position: int) -> DataError:
    if position == len(text):
        return DataError(f"{path} is empty; check that it is the file you mean and was written to its end")
    if text[position] == "{":
        return DataError(
            f"{path} holds a JSON object, expected a list of rows; if it has one row a line, "
            "name it .jsonl or choose the reader llava_jsonl"
        )
    return DataError(f"{path} must be UTF-8 and hold a JSON list of rows, but starts with {text[position:][:20]!r}")


def _syntax_error(path: Path, text: str, position: int, row: int, problem: str) -> DataError:
    line_start = text.rfind("\n", 0, position) + 1
    line = text.count("\n", 0, position) + 1
    column = len(text[line_start:position].encode("latin-1").decode("utf-8", errors="replace")) + 1
    ends = "; the file ends there: copy or download it again" if position >= len(text.rstrip()) else ""
    return DataError(
        f"{path}, line {line}, column {column} (row {row}): not JSON: {problem}{ends or '; mend the file'}"
    )


def _line_number(file: BinaryIO, position: int) -> int:
    """The line, from 1, that byte `position` is on."""
    file.seek(0)
    line = 1
    while position > 0:
        block = file.read(min(position, BLOCK_BYTES))
        line += block.count(b"\n")
        position -= len(block)
    return line
