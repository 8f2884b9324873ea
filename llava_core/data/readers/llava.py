"""LLaVA's own data files: one JSON list of rows, or one row a line.

Both are indexed once by byte offsets and read lazily, so that a reader costs 16 bytes a row in each worker process,
whatever the rows hold.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from json.decoder import JSONDecodeError
from pathlib import Path
from typing import BinaryIO

from llava_core.data.records import Record, parse_record
from llava_core.errors import BadRow, DataError

BOM = b"\xef\xbb\xbf"
WHITESPACE = re.compile(r"[ \t\r\n]*")
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class RowIndex:
    """Where the rows of a file are, in bytes."""

    starts: array[int]
    sizes: array[int]
    num_bytes: int


class IndexedReader:
    """Rows of a file by their byte offsets. See `Reader`."""

    def __init__(self, path: Path, index: RowIndex) -> None:
        if not index.starts:
            raise DataError(f"{path} holds no rows; check that it is the file you mean and was written to its end")
        self.path = path
        self._index = index

    def __len__(self) -> int:
        return len(self._index.starts)

    @property
    def fingerprint(self) -> Mapping[str, str | int]:
        """`path`, `num_bytes` and `num_rows`."""
        return {"path": str(self.path), "num_bytes": self._index.num_bytes, "num_rows": len(self)}

    def read(self, index: int) -> Record:
        """Row `index`. See `Reader.read`; reasons `malformed_json` and those of `parse_record`."""
        start, size = self._index.starts[index], self._index.sizes[index]
        with _open(self.path) as file:
            num_bytes = file.seek(0, 2)
            if num_bytes != self._index.num_bytes:
                raise DataError(
                    f"{self.path} changed while in use: it had {self._index.num_bytes} bytes and has {num_bytes}; "
                    "start again with a file that nothing writes to"
                )
            file.seek(start)
            text = file.read(size)
            try:
                row = json.loads(text.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                line = _line_number(file, start)
                raise BadRow("malformed_json", f"row {index} (line {line} of {self.path}): {error}") from error
        return parse_record(row, index)


class LlavaJsonReader(IndexedReader):
    """A JSON file that holds one list of rows.

    Raises:
        DataError: missing, empty, not a list, or not JSON; with the path, line and column.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, index_json_list(path))


class LlavaJsonlReader(IndexedReader):
    """A file with one JSON row a line; blank lines are not rows.

    Raises:
        DataError: missing or empty. A malformed line is a bad row when it is read.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, index_lines(path))


def index_lines(path: Path) -> RowIndex:
    """The lines of a file that are not blank."""
    starts, sizes, position = array("q"), array("q"), 0
    with _open(path) as file:
        for line in file:
            skipped = len(BOM) if position == 0 and line.startswith(BOM) else 0
            if line[skipped:].strip():
                starts.append(position + skipped)
                sizes.append(len(line) - skipped)
            position += len(line)
    return RowIndex(starts, sizes, position)


def index_json_list(path: Path) -> RowIndex:
    """The elements of the JSON list that a file holds; each is parsed, to find its end, and dropped.

    Raises:
        DataError: with the path, line and column of what is not JSON.
    """
    with _open(path) as file:
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
    return RowIndex(starts, sizes, len(text))


def _skip(text: str, position: int) -> int:
    match = WHITESPACE.match(text, position)
    assert match is not None  # it matches the empty string
    return match.end()


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"the data file {path} cannot be read: {error.strerror}; check data.path") from error


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
