"""Folders that appear when they are complete and durable."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `folder` at the end; after an error nothing of it is left.

    Between the two renames that replace an earlier folder a crash leaves both beside it, as `.partial` and `.replaced`.
    """
    partial = _beside(folder, ".partial")
    _remove(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        _put_in_place(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # frees a full disk; the next one sweeps what resists
        raise


def _put_in_place(partial: Path, folder: Path) -> None:
    """Gives a complete folder its name, durably."""
    for file in partial.iterdir():
        _sync(file)
    _sync(partial)
    replaced = _beside(folder, ".replaced")
    _remove(replaced)
    if folder.exists():
        os.rename(folder, replaced)
    os.rename(partial, folder)
    _sync(folder.parent)
    _remove(replaced)


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(folder.name + suffix)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _sync(path: Path) -> None:
    """Make a file's bytes, or the names in a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
