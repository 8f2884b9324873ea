"""Data sets that Hugging Face's `datasets` saved to disk, read by pyarrow without that library.

`save_to_disk` leaves a folder with `state.json`, which names files in the format of Arrow's streams; a DatasetDict has
one such folder a split and names them in `dataset_dict.json`. Source of the form: huggingface/datasets,
src/datasets/arrow_dataset.py and dataset_dict.py.

That library would bring pandas and more for a file that pyarrow reads by itself, and refuses the features of folders
that a newer release of it wrote.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava_core.data.readers import SAVED_DATASET_FILES
from llava_core.data.readers.columns import ColumnRows, arrow_errors, find_form, require_pyarrow
from llava_core.data.readers.index import KEPT_FROM_BYTES, IntArray, check_unchanged, kept_index
from llava_core.errors import BadRow, DataError

SPLITS_FILE, STATE_FILE = SAVED_DATASET_FILES
USUAL_SPLIT = "train"
END_MARK_BYTES = 8
MAX_ROW_BYTES = 1 << 28
"""A longer row is set aside: it would take a worker gigabytes."""


class SavedDatasetReader(ColumnRows):
    """The rows of a Dataset, or of one split of a DatasetDict. See `Reader`.

    What they are follows from the first of `columns.FORMS` whose columns are there; images are as in parquet, of which
    the library's Image feature is one form. Files are mapped into memory, so that rows in any order are quick.

    Args:
        path: the folder that was given to `save_to_disk`.
        split: by name; of a DatasetDict `train` if None.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: missing, empty, damaged, cut short or of other columns; no such split.
    """

    def __init__(self, path: Path, *, split: str | None = None, index_folder: Path | None = None) -> None:
        require_pyarrow(path)
        folder = _find_folder(path, split)
        state = _read_json(folder / STATE_FILE)
        files = [folder / str(file["filename"]) for file in state["_data_files"]]
        found = [_read_schema(file) for file in files]
        form = find_form(path, [_shown(names, state) for _, names in found])
        batches = kept_index(index_folder, "batches", files, lambda: _index_batches(files), min_bytes=KEPT_FROM_BYTES)
        super().__init__(path, form, files, [file.stat().st_size for file in files], batches[2].tolist())
        self._batches, self._schemas = batches[:2], [schema for schema, _ in found]
        self._names = sorted(_shown(found[0][1], state) & set(form.wanted))
        self._identity = {"split": folder.name if folder != path else "", "state": str(state.get("_fingerprint"))}
        self._sound: set[int] = set()

    @property
    def fingerprint(self) -> Mapping[str, str | int]:
        """As `ColumnRows`', with the `split` and, as `state`, what the library names its contents by."""
        return {**super().fingerprint, **self._identity}

    def _row(self, block: int, position: int, index: int) -> Any:
        """Reasons `broken_record_batch` and `row_too_large`."""
        import pyarrow

        file, start = (int(value) for value in self._batches[:, block])
        path = self._files[file]
        mapped = _map(path)
        check_unchanged(path, self._num_bytes[file], mapped.size())
        try:
            mapped.seek(start)
            batch = pyarrow.ipc.read_record_batch(pyarrow.ipc.read_message(mapped), self._schemas[file])
            batch = batch.select(self._names)
            if block not in self._sound:  # mapped as it stands: what is damaged would be read beyond its end
                batch.validate(full=True)
                self._sound.add(block)
        except arrow_errors() as error:
            raise BadRow("broken_record_batch", f"row {index}: at byte {start} of {path}: {error}") from error
        row = batch.slice(position, 1)
        if row.nbytes > MAX_ROW_BYTES:
            raise BadRow(
                "row_too_large", f"row {index} has {row.nbytes} bytes, the limit is {MAX_ROW_BYTES}: make it smaller"
            )
        return row


def _find_folder(path: Path, split: str | None) -> Path:
    """The folder of a split, or of the whole. Raises DataError."""
    if (path / SPLITS_FILE).is_file():
        splits = _read_json(path / SPLITS_FILE).get("splits")
        wanted = split or USUAL_SPLIT
        if not isinstance(splits, list) or wanted not in splits:
            known = ", ".join(map(str, splits)) if isinstance(splits, list) else "none"
            raise DataError(f"{path} has no split {wanted!r}; there are: {known}. Set split to one of them")
        return path / wanted
    if not (path / STATE_FILE).is_file():
        raise DataError(
            f"{path} holds neither {SPLITS_FILE} nor {STATE_FILE}: expected a folder that save_to_disk made"
        )
    if split is not None and split != _read_json(path / STATE_FILE).get("_split"):
        raise DataError(f"split = {split!r}: {path} is one data set without splits; leave it out")
    return path


def _read_json(file: Path) -> dict[str, Any]:
    """Raises DataError where it is not what the library writes."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}; save the data set again") from error
    is_state = file.name == STATE_FILE
    if not isinstance(found, dict) or (is_state and not _names_files(found.get("_data_files"))):
        raise DataError(f"{file} names no files of a data set; save it again with a newer release of datasets")
    if is_state and not _names_columns(found.get("_format_columns")):
        raise DataError(f"{file} has _format_columns {found['_format_columns']!r}, expected a list of names or null")
    if is_state and any(Path(str(one["filename"])).name != one["filename"] for one in found["_data_files"]):
        raise DataError(f"{file} names files outside its folder; save the data set again")
    if is_state and found.get("_indices_data_files"):
        raise DataError(
            f"{file} has a separate order of rows, as releases of datasets before 1.9 wrote it and newer ones ignore: "
            "load it with that release and save what flatten_indices() gives"
        )
    return found


def _shown(names: Sequence[str], state: Mapping[str, Any]) -> frozenset[str]:
    """The columns that the library would show: `set_format` may have hidden the others."""
    shown = None if state.get("_output_all_columns") else state.get("_format_columns")
    return frozenset(names if shown is None else set(names) & set(shown))


def _names_files(found: object) -> bool:
    return (
        isinstance(found, list)
        and bool(found)
        and all(isinstance(file, dict) and isinstance(file.get("filename"), str) for file in found)
    )


def _names_columns(found: object) -> bool:
    return found is None or (isinstance(found, list) and all(isinstance(name, str) for name in found))


def _map(path: Path) -> Any:
    """A file in memory as it stands. Raises DataError."""
    import pyarrow

    try:
        return pyarrow.memory_map(str(path))
    except arrow_errors() as error:
        raise DataError(f"the data file {path} cannot be read: {error}; check data.path") from error


def _messages(path: Path) -> Iterator[tuple[int, Any]]:
    """Each message of a stream, with its first byte. Raises DataError where it has no end mark, or is damaged."""
    import pyarrow

    mapped = _map(path)
    try:
        while True:
            start = mapped.tell()
            try:
                message = pyarrow.ipc.read_message(mapped)
            except EOFError:
                break
            yield start, message
    except arrow_errors() as error:
        raise _unreadable(path, error) from error
    if mapped.size() < start + END_MARK_BYTES:
        raise DataError(f"{path} lacks the end mark of an Arrow stream: it was cut short, copy it again")


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} cannot be read as an Arrow stream: {error}; copy it again")


def _read_schema(path: Path) -> tuple[Any, list[str]]:
    """The types of a file's columns, and their names. Raises DataError."""
    import pyarrow

    _, message = next(_messages(path), (0, None))
    if message is None or message.type != "schema":
        raise DataError(f"{path} does not start as an Arrow stream; save the data set again")
    try:
        schema = pyarrow.ipc.read_schema(message)
        return schema, schema.names  # one that is no text is told here
    except arrow_errors() as error:
        raise _unreadable(path, error) from error


def _index_batches(files: Sequence[Path]) -> IntArray:
    """[3, N] int64: the file, the first byte and the rows of each batch."""
    columns = [array("q"), array("q"), array("q")]
    for number, file in enumerate(files):
        for start, rows in _batches(file):
            for column, value in zip(columns, (number, start, rows), strict=True):
                column.append(value)
    return np.array(columns, dtype=np.int64)


def _batches(path: Path) -> Iterator[tuple[int, int]]:
    """The first byte and the rows of each batch of a file. Raises DataError."""
    import pyarrow

    schema, _ = _read_schema(path)
    for start, message in _messages(path):
        if message.type == "record batch":
            try:
                yield start, pyarrow.ipc.read_record_batch(message, schema).num_rows
            except arrow_errors() as error:
                raise _unreadable(path, error) from error
        elif message.type != "schema":
            raise DataError(
                f"{path} has a column of categories (a {message.type} message): turn it into texts and save the data "
                "set again"
            )
