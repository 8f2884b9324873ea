"""A part of a prepared data set: some rows of the source, and one file made of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from llava_core.data.examples import Rejected
from llava_core.data.readers import Reader
from llava_core.data.records import Row
from llava_core.durable import FileDigest, sync_directory, write_file
from llava_core.errors import BadRow, DataError


@dataclass
class RowLog:
    """Hears of each row of a part."""

    advance: Callable[[int], None]
    num_good: int = 0
    rejected: list[Rejected] = field(default_factory=list)

    def good(self) -> None:
        """A row that can be used."""
        self.num_good += 1
        self.advance(1)

    def bad(self, row_id: str, index: int, problem: BadRow) -> None:
        """One that cannot."""
        self.rejected.append(Rejected(row_id, index, problem.reason, problem.message))
        self.advance(1)


@dataclass(frozen=True)
class Part:
    """A part that is complete."""

    number: int
    num_good: int
    rejected: tuple[Rejected, ...]
    file: str
    digest: FileDigest

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()


class Target(Protocol):
    """A form that data sets can be written in."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """JSON values that decide, with the rows, what is written."""
        ...

    @property
    def parts_are_kept(self) -> bool:
        """Whether the parts' files are what was asked for, or only on the way to it."""
        ...

    def check(self, reader: Reader) -> None:
        """Raises DataError or ConfigError for a data set that this form has no place for."""
        ...

    def file_name(self, number: int) -> str:
        """Of a part's file; by name the files are in the parts' order."""
        ...

    def chunks(self, reader: Reader, rows: range, log: RowLog, folder: Path) -> Iterator[bytes]:
        """The bytes of a part's file; `folder` may hold what does not belong in memory."""
        ...

    def finish(self, folder: Path, parts: list[Path]) -> dict[str, FileDigest]:
        """Write what is made of all parts into `folder`; the files it wrote, by name."""
        ...


@dataclass(frozen=True)
class PartWriter:
    """Writes a part's file, and then what `read_part` needs; a part without that is not there."""

    reader: Reader
    target: Target
    part_size: int
    files: Path
    reports: Path

    def __call__(self, number: int, advance: Callable[[int], None]) -> Part:
        """See `Task`. Raises DataError and OSError."""
        rows = range(number * self.part_size, min((number + 1) * self.part_size, len(self.reader)))
        name, log = self.target.file_name(number), RowLog(advance)
        digest = put_file(self.files / name, self.target.chunks(self.reader, rows, log, self.reports))
        part = Part(number, log.num_good, tuple(log.rejected), name, digest)
        put_file(report_path(self.reports, number), [part.encode()])
        return part


def put_file(path: Path, chunks: Any) -> FileDigest:
    """Write a file that appears when it is whole and durable, in the place of one that may be there."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    digest = write_file(partial, chunks)
    os.replace(partial, path)
    sync_directory(path.parent)
    return digest


def report_path(reports: Path, number: int) -> Path:
    """Where it says that a part is complete."""
    return reports / f"part-{number:06d}.json"


def read_part(reports: Path, files: Path, number: int) -> Part | None:
    """A part that is complete; None where it is still to be made. Raises DataError for one that is damaged."""
    path = report_path(reports, number)
    if not path.is_file():
        return None
    try:
        body = json.loads(path.read_bytes())
        rejected = tuple(Rejected(**row) for row in body["rejected"])
        part = Part(body["number"], body["num_good"], rejected, body["file"], FileDigest(**body["digest"]))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error!r}): remove it, and its part is made again") from error
    file = files / part.file
    return part if file.is_file() and file.stat().st_size == part.digest.size else None


def usable_rows(reader: Reader, rows: range, log: RowLog) -> Iterator[Row]:
    """The rows that can be read; the others are told to the log. Raises DataError."""
    for index in rows:
        try:
            row = reader.read(index)
        except BadRow as bad:
            log.bad(f"row-{index}", index, bad)
            continue
        yield row
