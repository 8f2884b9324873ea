"""Parquet files, as the Hugging Face hub has them: conversations, instructions or documents, by their columns."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from llava_core.data.overlong import Overlong
from llava_core.data.readers import Content
from llava_core.data.readers.index import check_unchanged
from llava_core.data.readers.instructions import parse_alpaca, parse_sharegpt
from llava_core.data.readers.text import parse_text_row
from llava_core.data.records import IMAGE_KEYS, Record
from llava_core.errors import BadRow, ConfigError, DataError

MAX_GROUP_BYTES = 1 << 30
"""Rows are read by the row group; a larger one would take each worker gigabytes."""

OPTIONAL_COLUMNS = ("id", "input", "system", "history", *IMAGE_KEYS)


class Form(NamedTuple):
    """What rows with these columns are."""

    columns: tuple[str, ...]
    content: Content
    parse: Callable[[object, int], Record]
    usual_overlong: Overlong

    @property
    def wanted(self) -> tuple[str, ...]:
        """The columns that are read."""
        return (*self.columns, *OPTIONAL_COLUMNS)


FORMS = (
    Form(("conversations",), "conversations", parse_sharegpt, "truncate"),
    Form(("messages",), "conversations", parse_sharegpt, "truncate"),
    Form(("instruction", "output"), "conversations", parse_alpaca, "truncate"),
    Form(("text",), "texts", parse_text_row, "split"),
)


class RowGroup(NamedTuple):
    """Some rows of a file, which are read together."""

    file: int
    number: int


class ParquetReader:
    """The rows of a .parquet file, or of all in a folder, by name. See `Reader`.

    What they are follows from the first of `FORMS` whose columns are there. Images are in `image` or `images`: the
    bytes of a file, a path in the image folder, or both, in a struct of `bytes` and `path`; or lists of these.

    A row is read with its row group, and the last group stays in memory, so that rows in order are quick. In random
    order each costs a row group.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: missing, empty, damaged or of other columns; row groups that are too large.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        if not self._files:
            raise DataError(f"{path} holds no .parquet file; check that it is the folder you mean")
        self._groups: list[RowGroup] = []
        sizes: list[int] = []
        described, columns = [], set()
        for number, opened in enumerate(map(_open, self._files)):
            metadata = opened.metadata
            described.append(metadata)
            columns.add(frozenset(opened.schema_arrow.names))
            for group in range(metadata.num_row_groups):
                self._groups.append(RowGroup(number, group))
                sizes.append(metadata.row_group(group).num_rows)
        self._starts = [0, *accumulate(sizes)]
        if not len(self):
            raise DataError(f"{path} holds no rows; check that it is the file you mean and was written to its end")
        if len(columns) > 1:
            raise DataError(f"the files of {path} differ in their columns: name those of one kind")
        self._form = _form(path, columns.pop())
        for file, number in self._groups:
            _check_size(self._files[file], described[file], number, self._form.wanted)
        self._num_bytes = [file.stat().st_size for file in self._files]
        self._last: tuple[int, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_last": None}

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def content(self) -> Content:
        return self._form.content

    @property
    def usual_overlong(self) -> Overlong:
        return self._form.usual_overlong

    @property
    def fingerprint(self) -> Mapping[str, str | int]:
        """`path`, `num_bytes`, `num_rows` and `num_files`."""
        num_bytes, num_files = sum(self._num_bytes), len(self._files)
        return {"path": str(self.path), "num_bytes": num_bytes, "num_rows": len(self), "num_files": num_files}

    def read(self, index: int) -> Record:
        """Row `index`. See `Reader.read`; reasons `broken_row_group`, `not_utf8` and those of the form's parser."""
        group = bisect_right(self._starts, index) - 1
        if self._last is None or self._last[0] != group:
            self._last = group, self._read_group(group, index)
        try:
            (row,) = self._last[1].slice(index - self._starts[group], 1).to_pylist()
        except UnicodeDecodeError as error:
            raise BadRow("not_utf8", f"row {index} of {self.path}: {error}") from error
        return self._form.parse(row, index)

    def _read_group(self, group: int, index: int) -> Any:
        file, number = self._groups[group]
        path = self._files[file]
        opened = _open(path)
        check_unchanged(path, self._num_bytes[file], path.stat().st_size)
        names = [name for name in opened.schema_arrow.names if name in self._form.wanted]
        try:
            return opened.read_row_group(number, columns=names, use_threads=False)
        except _arrow_errors() as error:
            raise BadRow("broken_row_group", f"row {index}: row group {number} of {path}: {error}") from error


def _open(path: Path) -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(f"{path} needs pyarrow to be read: pip install 'llava-core[parquet]'") from error
    try:
        return parquet.ParquetFile(path)
    except _arrow_errors() as error:
        raise DataError(f"{path} cannot be read as a parquet file: {error}; copy it again") from error


def _arrow_errors() -> tuple[type[Exception], ...]:
    """What pyarrow raises on files that it cannot read."""
    from pyarrow import ArrowException

    return OSError, ValueError, ArrowException


def _check_size(path: Path, metadata: Any, group: int, wanted: Collection[str]) -> None:
    """Refuses a row group that is too large; the columns that are not read do not count."""
    row_group = metadata.row_group(group)
    columns = [row_group.column(number) for number in range(row_group.num_columns)]
    num_bytes = sum(
        column.total_uncompressed_size for column in columns if column.path_in_schema.split(".")[0] in wanted
    )
    if num_bytes > MAX_GROUP_BYTES:
        raise DataError(
            f"row group {group} of {path} has {num_bytes} bytes, and each row is read with its group: write the file "
            f"again with groups of at most {MAX_GROUP_BYTES} bytes"
        )


def _form(path: Path, columns: frozenset[str]) -> Form:
    found = next((form for form in FORMS if columns.issuperset(form.columns)), None)
    if found is None:
        known = "; ".join(", ".join(form.columns) for form in FORMS)
        raise DataError(f"{path} has the columns {', '.join(sorted(columns))}; expected one of: {known}")
    return found
