"""Preparing a data set: parts by several processes, gone on with after an interruption, and complete or not there."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llava_core.data.prepare.parts import Part, PartWriter, Target, read_part
from llava_core.data.prepare.work import Work, finished, opened
from llava_core.data.prepare.workers import started
from llava_core.data.prepared import Prepared
from llava_core.data.quarantine import Quarantine
from llava_core.data.readers import Reader
from llava_core.data.readers.tokens import TokensReader
from llava_core.durable import FileDigest
from llava_core.errors import ConfigError, DataError

QUARANTINE = "quarantine.jsonl"


class Watch(Protocol):
    """Is told how far it is."""

    def start(self, total: int, done: int) -> None: ...

    def advance(self, count: int) -> None: ...


@dataclass(frozen=True)
class Preparation:
    """What is to be prepared, and how.

    Attributes:
        kind: what the target is called.
        source: the file or folder that the reader reads.
        part_size: rows of a part.
    """

    kind: str
    source: Path
    reader: Reader
    target: Target
    output: Path
    part_size: int
    num_workers: int
    max_bad_fraction: float

    def run(self, watch: Watch) -> Prepared:
        """Prepare what is not there yet. The same request gives the same bytes, however often it is interrupted and by
        however many processes.

        Raises:
            ConfigError: sizes that mean nothing; an output that holds something else, or lies in the source.
            DataError: a data set that this form has no place for, that was tokenised before, or that changes meanwhile.
            TrainingError: more rows than `max_bad_fraction` cannot be used.
        """
        for name in ("part_size", "num_workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: expected at least 1.")
        if not len(self.reader):
            raise DataError(f"{self.source} has no rows; check that it is the file you mean")
        if isinstance(self.reader, TokensReader):
            raise DataError(f"{self.source} was prepared as token ids: prepare the data that they were made of")
        if self.source.is_dir() and self.output.resolve().is_relative_to(self.source.resolve()):
            raise ConfigError(f"output = {self.output} lies in {self.source}, and would change it: name another.")
        self.target.check(self.reader)
        request = self.request()
        done = finished(self.output, request)
        if done is not None:
            return done
        with opened(self.output, request) as work:
            self._make_parts(work, watch)
            if self.request() != request:
                raise DataError(
                    f"{self.source} changed while it was prepared: remove {work.folder}, and start again with files "
                    "that nothing writes to"
                )
            return self._complete(work)

    def request(self) -> dict[str, Any]:
        """All that decides what is written, as JSON values."""
        reader = self.reader
        source = {
            "reader": type(reader).__name__,
            "content": reader.content,
            "usual_overlong": reader.usual_overlong,
            "num_rows": len(reader),
            "data": {key: value for key, value in reader.fingerprint.items() if key != "path"},
            "files": _facts(self.source) if self.source.exists() else None,
        }
        found = {"to": self.kind, "source": source, "settings": self.target.settings, "part_size": self.part_size}
        copied: dict[str, Any] = json.loads(json.dumps(found))  # as it is read again
        return copied

    def _make_parts(self, work: Work, watch: Watch) -> None:
        quarantine = Quarantine(
            work.folder / QUARANTINE,
            self.max_bad_fraction,
            remedy=f"mend the data and remove {work.folder} to start again, or raise --max-bad-fraction and go on",
        )
        parts = [read_part(work.inner, self._files(work), number) for number in range(self._num_parts)]
        for part in parts:
            if part is not None:
                _count(part, quarantine)
        quarantine.check(len(self.reader))
        missing = [number for number, part in enumerate(parts) if part is None]
        writer = PartWriter(self.reader, self.target, self.part_size, self._files(work), work.inner)
        with started(writer, missing, self.num_workers, watch.advance) as made:
            watch.start(len(self.reader), quarantine.num_bad + quarantine.num_good)
            for part in made:
                _count(part, quarantine)
                quarantine.check(len(self.reader))

    def _complete(self, work: Work) -> Prepared:
        """Put the parts together. The list of bad rows is written anew, in the rows' order."""
        listed = work.folder / QUARANTINE
        listed.unlink(missing_ok=True)
        quarantine = Quarantine(listed, 1.0)
        files: dict[str, FileDigest] = {}
        paths = []
        for number in range(self._num_parts):
            part = read_part(work.inner, self._files(work), number)
            assert part is not None
            _count(part, quarantine)
            paths.append(self._files(work) / part.file)
            if self.target.parts_are_kept:
                files[part.file] = part.digest
        if not quarantine.num_good:
            raise DataError(f"none of the {quarantine.num_bad} rows can be used; {listed} says why")
        files |= self.target.finish(work.folder, paths)
        prepared = Prepared(self.request(), len(self.reader), quarantine.num_bad, files)
        work.complete(prepared)
        return prepared

    @property
    def _num_parts(self) -> int:
        return -(-len(self.reader) // self.part_size)

    def _files(self, work: Work) -> Path:
        """Where the parts' files are."""
        return work.folder if self.target.parts_are_kept else work.inner


def _count(part: Part, quarantine: Quarantine) -> None:
    quarantine.add_good(part.num_good)
    for bad in part.rejected:
        quarantine.add(bad.id, bad.index, bad.reason, bad.message)


def _facts(source: Path) -> str:
    """A hash of the names, sizes and times of change of the files."""
    files = sorted(file for file in source.rglob("*") if file.is_file()) if source.is_dir() else [source]
    facts = []
    for file in files:
        found = file.stat()
        name = str(file.relative_to(source)) if source.is_dir() else ""
        facts.append((name, found.st_size, found.st_mtime_ns))
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
