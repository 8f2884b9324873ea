"""Readers: from a data file to records, by row number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from llava_core.data.records import Record
from llava_core.errors import ConfigError

SUFFIX_READERS: Mapping[str, str] = {".json": "llava_json", ".jsonl": "llava_jsonl"}


class Reader(Protocol):
    """Random access to the rows of a data set.

    A reader can be pickled and used from many processes at once: it holds no open file and no position.
    """

    def __len__(self) -> int: ...

    def read(self, index: int) -> Record:
        """Row `index`, from 0.

        Raises:
            BadRow: this row cannot be used; the others can.
            DataError: the data set cannot be used any more, e.g. it changed.
        """
        ...

    @property
    def fingerprint(self) -> Mapping[str, str | int]:
        """JSON values that name the data; a resumed run compares them, to go on in the same rows."""
        ...


ReaderFactory = Callable[[Path], Reader]


def open_reader(path: Path, reader_name: str | None, registry: Mapping[str, ReaderFactory]) -> Reader:
    """The reader called `reader_name` in the registry, or the one for the file's suffix.

    Raises:
        ConfigError: no such reader, or a suffix without one.
        DataError: the file cannot be read as a data set.
    """
    name = reader_name or SUFFIX_READERS.get(path.suffix.lower())
    if name is None:
        raise ConfigError(
            f"no reader is known for {path}: its suffix is {path.suffix!r}, known are {', '.join(SUFFIX_READERS)}; "
            f"name the reader, one of {', '.join(sorted(registry))}"
        )
    if name not in registry:
        raise ConfigError(f"there is no reader {name!r}; there are {', '.join(sorted(registry)) or 'none'}")
    return registry[name](path)
