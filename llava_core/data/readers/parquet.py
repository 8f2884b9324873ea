"""Parquet files, whose rows are read by the row group."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from llava_core.data.readers.columns import ColumnRows, arrow_errors, find_form, require_pyarrow
from llava_core.data.readers.index import check_unchanged
from llava_core.errors import BadRow, DataError

MAX_GROUP_BYTES = 1 << 30
"""Rows are read by the row group; a larger one would take each worker gigabytes."""


class RowGroup(NamedTuple):
    """Some rows of a file, which are read together."""

    file: int
    number: int


class ParquetReader(ColumnRows):
    """The rows of a .parquet file, or of all in a folder, by name. See `Reader`.

    What they are follows from the first of `columns.FORMS` whose columns are there. Images are in `image` or `images`:
    the bytes of a file, a path in the image folder, or both, in a struct of `bytes` and `path`; or lists of these.

    A row is read with its row group, and the last group stays in memory, so that rows in order are quick. In random
    order each costs a row group. A damaged one sets its rows aside, as `broken_row_group`.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: missing, empty, damaged or of other columns; row groups that are too large.
    """

    def __init__(self, path: Path) -> None:
        files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        if not files:
            raise DataError(f"{path} holds no .parquet file; check that it is the folder you mean")
        self._groups: list[RowGroup] = []
        sizes: list[int] = []
        described, columns = [], []
        for number, opened in enumerate(map(_open, files)):
            metadata = opened.metadata
            described.append(metadata)
            columns.append(frozenset(opened.schema_arrow.names))
            groups = [RowGroup(number, group) for group in range(metadata.num_row_groups)]
            counts = [metadata.row_group(group.number).num_rows for group in groups]
            if sum(counts) != metadata.num_rows:
                raise DataError(
                    f"{files[number]} tells of {metadata.num_rows} rows, and its row groups of {sum(counts)}: copy it "
                    "again"
                )
            self._groups += groups
            sizes += counts
        super().__init__(path, find_form(path, columns), files, [file.stat().st_size for file in files], sizes)
        for file, number in self._groups:
            _check_size(files[file], described[file], number, self._form.wanted)
        self._last: tuple[int, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_last": None}

    def _row(self, block: int, position: int, index: int) -> Any:
        if self._last is None or self._last[0] != block:
            self._last = block, self._read_group(block, index)
        return self._last[1].slice(position, 1)

    def _read_group(self, group: int, index: int) -> Any:
        file, number = self._groups[group]
        path = self._files[file]
        opened = _open(path)
        check_unchanged(path, self._num_bytes[file], path.stat().st_size)
        names = [name for name in opened.schema_arrow.names if name in self._form.wanted]
        try:
            found = opened.read_row_group(number, columns=names, use_threads=False)
        except arrow_errors() as error:
            raise BadRow("broken_row_group", f"row {index}: row group {number} of {path}: {error}") from error
        told = self._starts[group + 1] - self._starts[group]
        if found.num_rows != told:
            raise BadRow(
                "broken_row_group",
                f"row {index}: row group {number} of {path} has {found.num_rows} rows and tells of {told}",
            )
        return found


def _open(path: Path) -> Any:
    require_pyarrow(path)
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path)
    except arrow_errors() as error:
        raise DataError(f"{path} cannot be read as a parquet file: {error}; copy it again") from error


def _check_size(path: Path, metadata: Any, group: int, wanted: Collection[str]) -> None:
    """Refuses a row group that is too large; the columns that are not read do not count."""
    row_group = metadata.row_group(group)
    # Columns are looked at only where it matters: of one whose description is damaged pyarrow ends the process.
    if row_group.total_byte_size <= MAX_GROUP_BYTES:
        return
    columns = [row_group.column(number) for number in range(row_group.num_columns)]
    num_bytes = sum(
        column.total_uncompressed_size for column in columns if column.path_in_schema.split(".")[0] in wanted
    )
    if num_bytes > MAX_GROUP_BYTES:
        raise DataError(
            f"row group {group} of {path} has {num_bytes} bytes, and each row is read with its group: write the file "
            f"again with groups of at most {MAX_GROUP_BYTES} bytes"
        )
