"""Readers: from a data file to records, by row number."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from llava_core.data.overlong import Overlong
from llava_core.data.prepared import MANIFEST, read_prepared
from llava_core.data.records import Row
from llava_core.errors import ConfigError

SUFFIX_READERS: Mapping[str, str] = {
    ".json": "llava_json",
    ".jsonl": "llava_jsonl",
    ".txt": "text",
    ".idx": "megatron",
    ".bin": "megatron",
    ".tar": "webdataset",
    ".parquet": "parquet",
}

SAVED_DATASET_FILES = ("dataset_dict.json", "state.json")
"""One of them is in a folder that `save_to_disk` of Hugging Face's datasets made: of several splits, or of one."""

PREPARED_READERS: Mapping[str, str] = {"webdataset": "webdataset", "tokens": "tokens"}
"""For folders that `data prepare` wrote, by what they were prepared as."""

Content = Literal["conversations", "texts", "tokens"]
"""What the rows of a data set are: `Record`s for a conversation template, `Record`s that are documents, `TokenRow`s.

Of the first two, `EncodedRecord`s where they were tokenised before.
"""


class Reader(Protocol):
    """Random access to the rows of a data set.

    A reader can be pickled and used from many processes at once: it holds no open file and no position.
    """

    @property
    def content(self) -> Content: ...

    @property
    def usual_overlong(self) -> Overlong:
        """What becomes of a row that is too long where nothing is said: the end of a document is worth as much as its
        start, and the end of a conversation little without it."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> Row:
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


ReaderFactory = Callable[..., Reader]
"""`(path, *, split, index_folder) -> Reader`; it leaves out the keywords that it has no use for.

`split` is the part of the data set that was asked for, by name, or None. `index_folder` is where an index that takes
long to make can be kept (see `index.kept_index`), or None.
"""


def reader_name(path: Path) -> str | None:
    """The reader for a file of this suffix, for files whose names start with it, or for a folder, if there is one.

    Raises:
        ConfigError: a folder with a Megatron data set that `data prepare` wrote, which is named by its files.
        DataError: a folder that was prepared, and is not complete.
    """
    if names_a_pair(path):
        return "megatron"
    if (path / ".nv-meta").is_dir():
        return "energon"
    if any((path / name).is_file() for name in SAVED_DATASET_FILES):
        return "datasets"
    if (path / MANIFEST).is_file():
        return _prepared_reader(path)
    return SUFFIX_READERS.get(path.suffix.lower())


def _prepared_reader(path: Path) -> str:
    request = read_prepared(path).request
    to, name = request["to"], request["settings"].get("name")
    if to not in PREPARED_READERS:
        raise ConfigError(f"{path} holds a Megatron data set: name {path / str(name)}, and the reader {to}")
    return PREPARED_READERS[to]


def prefixed(path: Path, suffix: str) -> Path:
    """The file whose name is this one's with a suffix more."""
    return path.with_name(path.name + suffix)


def names_a_pair(path: Path) -> bool:
    """Whether it is no file, but what the .bin and the .idx of a Megatron data set have in common."""
    return not path.exists() and prefixed(path, ".idx").exists()


def unknown_suffix(path: Path, names: Iterable[str]) -> ConfigError:
    """The error for a file that no reader is chosen for; `names` are those that there are."""
    return ConfigError(
        f"no reader is known for {path}: its suffix is {path.suffix!r}, known are {', '.join(SUFFIX_READERS)}; "
        f"name the reader, one of {', '.join(sorted(names))}"
    )


def open_reader(
    path: Path,
    name: str | None,
    registry: Mapping[str, ReaderFactory],
    *,
    split: str | None = None,
    index_folder: Path | None = None,
) -> Reader:
    """The reader called `name` in the registry, or the one for the file's suffix.

    Raises:
        ConfigError: no such reader, or a suffix without one; a split of a reader that knows none.
        DataError: the file cannot be read as a data set.
    """
    name = name or reader_name(path)
    if name is None:
        raise unknown_suffix(path, registry)
    if name not in registry:
        raise ConfigError(f"there is no reader {name!r}; there are {', '.join(sorted(registry)) or 'none'}")
    factory = registry[name]
    takes = inspect.signature(factory).parameters
    options: dict[str, Any] = {}
    if split is not None:
        if "split" not in takes:
            raise ConfigError(f"split = {split!r} of {path}: the reader {name!r} knows no splits; leave it out")
        options["split"] = split
    if "index_folder" in takes:
        options["index_folder"] = index_folder
    return factory(path, **options)
