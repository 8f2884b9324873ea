"""Where the rows of a large file are: found once, kept in a file, and mapped into each process that reads rows."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from io import BufferedReader
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llava_core.errors import DataError

IntArray = NDArray[np.int64]

KEPT_FROM_BYTES = 1 << 26
"""An index of less data is quicker made again than looked after."""

FORMAT = 1
"""Part of an index's name: one that an older version kept is made anew."""


def kept_index(
    folder: Path | None,
    kind: str,
    sources: Sequence[Path],
    build: Callable[[], IntArray],
    *,
    min_bytes: int,
    left_out: Sequence[str] = (),
) -> IntArray:
    """What `build` gives, from `folder` if it was kept there for these very files.

    Any number of processes may call this at once: each that finds nothing builds the index and puts it in place whole.

    Args:
        folder: where to keep it; None for nowhere.
        kind: which index of the files it is.
        sources: the files that it is of; their sizes and times of change tell whether it still is.
        min_bytes: of all files together, from which on it is kept.
        left_out: what of the files it does not list.

    Returns:
        [K, N] int64, read-only; a column of a large one costs no memory until it is read.

    Raises:
        DataError: a source cannot be read, or the index cannot be written.
    """
    facts = [_facts(path) for path in sources]
    if folder is None or sum(size for _, size, _ in facts) < min_bytes:
        return build()
    digest = hashlib.sha256(repr((FORMAT, kind, facts, sorted(left_out))).encode()).hexdigest()[:16]
    file = folder / f"{sources[0].name}-{kind}-{digest}.npy"
    if not file.is_file():
        _put_in_place(file, build())
    try:
        index: IntArray = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"the index {file} cannot be read ({error}): remove it, and it is made anew.") from error
    return index


def open_data(path: Path) -> BufferedReader:
    """A data file, to read bytes of. Raises DataError."""
    try:
        return path.open("rb")
    except OSError as error:
        raise _unreadable(path, error) from error


def check_unchanged(path: Path, then: int, now: int) -> None:
    """A data file still has as many bytes as when it was opened first.

    Raises:
        DataError: it has not.
    """
    if now != then:
        raise DataError(
            f"{path} changed while in use: it had {then} bytes and has {now}; start again with files that nothing "
            "writes to"
        )


def describe_files(path: Path, files: Sequence[Path], sizes: Sequence[int], num_rows: int) -> dict[str, str | int]:
    """The fingerprint of a data set of several files in the folder `path`, or of the one that `path` is.

    `files` stands for each one's name and size, in their order: two that grew and shrank by as much are other data.
    """
    listed = [(file.relative_to(path).as_posix(), size) for file, size in zip(files, sizes, strict=True)]
    return {
        "path": str(path),
        "num_bytes": sum(sizes),
        "num_rows": num_rows,
        "num_files": len(files),
        "files": hashlib.sha256(repr(listed).encode()).hexdigest()[:16],
    }


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"the data file {path} cannot be read: {error.strerror}; check data.path")


def _facts(path: Path) -> tuple[str, int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    return os.path.abspath(path), found.st_size, found.st_mtime_ns


def _put_in_place(file: Path, index: IntArray) -> None:
    """Through another name, so that no process sees half of it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".partial", delete=False) as partial:
            np.save(partial, index)
            partial.flush()
            os.fsync(partial.fileno())
        os.replace(partial.name, file)
    except OSError as error:
        raise DataError(f"the index {file} cannot be written: {error.strerror}; name another output.") from error
