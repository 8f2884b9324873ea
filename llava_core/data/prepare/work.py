"""The folder in which a data set is prepared: beside the output until it is complete, and then in its place."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_core.data.fingerprint import differences
from llava_core.data.prepare.parts import put_file
from llava_core.data.prepared import MANIFEST, Prepared, read_prepared
from llava_core.durable import make_directory, sync_directory
from llava_core.errors import ConfigError, DataError

LOCK = "lock"
INNER = ".work"
"""What is needed only until the data set is complete."""


@dataclass(frozen=True)
class Work:
    """A folder to go on in.

    Attributes:
        folder: becomes the output.
        inner: in it, what is not part of the output.
    """

    folder: Path
    output: Path
    request: Mapping[str, Any]

    @property
    def inner(self) -> Path:
        return self.folder / INNER

    def complete(self, prepared: Prepared) -> None:
        """Write the manifest, and give the folder its name; what happened until here can be gone on with."""
        put_file(self.folder / MANIFEST, [prepared.encode()])
        os.rename(self.folder, self.output)
        sync_directory(self.output.parent)
        shutil.rmtree(self.output / INNER)


def finished(output: Path, request: Mapping[str, Any]) -> Prepared | None:
    """What the output holds already, if that was asked for in the same way.

    Raises:
        ConfigError: it holds something else.
    """
    if not os.path.lexists(output) or (output.is_dir() and not any(output.iterdir())):
        return None
    if not (output / MANIFEST).is_file():
        raise ConfigError(f"output = {output} exists and was not written by data prepare: name another, or remove it.")
    prepared = read_prepared(output)
    _refuse_other(output, prepared.request, request)
    if (output / INNER).is_dir():  # left there by a crash after all was done
        shutil.rmtree(output / INNER)
    return prepared


@contextmanager
def opened(output: Path, request: Mapping[str, Any]) -> Iterator[Work]:
    """The folder to work in: a new one, or that of a run with the same request which was interrupted.

    Raises:
        ConfigError: it is of another request, of something else, or another process works in it.
    """
    place = output.resolve()  # a link cannot be replaced by a folder
    folder = place.with_name(place.name + ".partial")
    work = Work(folder, place, request)
    file = work.inner / "request.json"
    if folder.is_dir() and any(folder.iterdir()) and not (file.is_file() or _only_begun(work)):
        raise ConfigError(f"{folder} exists and was not made by data prepare: name another output, or remove it.")
    make_directory(work.inner)
    with _alone(work.inner / LOCK, output):
        if not file.is_file():
            put_file(file, [json.dumps(request, indent=1).encode()])
        try:
            then = json.loads(file.read_bytes())
        except ValueError as error:
            raise DataError(f"{file} cannot be read ({error}): remove {folder} to start afresh") from error
        _refuse_other(folder, then, request)
        yield work


@contextmanager
def _alone(file: Path, output: Path) -> Iterator[None]:
    """While no other process is in here. The system lets go of the lock however this one ends, also where processes
    that it started live on for a moment: they do not share it."""
    with file.open("wb") as locked:
        try:
            fcntl.lockf(locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise ConfigError(f"another process is preparing {output}: wait for it, or name another output.") from None
        yield


def _only_begun(work: Work) -> bool:
    """Whether the folder was made by a run that ended before it said what it was asked."""
    inner = [work.inner] if work.inner.is_dir() else []
    return list(work.folder.iterdir()) == inner and all(
        file.name == LOCK or file.suffix == ".partial" for file in work.inner.iterdir()
    )


def _refuse_other(folder: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = differences(then, now)
    if changed:
        raise ConfigError(
            f"{folder} was made from other data or with other settings:{changed}\n"
            "Restore them to go on, name another output, or remove that folder to start afresh."
        )
