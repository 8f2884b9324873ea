"""Rows of columns, as the Hugging Face hub has them: conversations, instructions or documents, by the names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from llava_core.data.overlong import Overlong
from llava_core.data.readers import Content
from llava_core.data.readers.index import describe_files
from llava_core.data.readers.instructions import parse_alpaca, parse_sharegpt
from llava_core.data.readers.text import parse_text_row
from llava_core.data.records import IMAGE_KEYS, Record
from llava_core.errors import BadRow, ConfigError, DataError

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


class ColumnRows(ABC):
    """The rows of some files, which are read in blocks. See `Reader`.

    Args:
        path: what the user called them.
        form: what the rows are.
        files, sizes: the files, and their bytes.
        block_sizes: rows of each block, in order.

    Raises:
        DataError: no rows.
    """

    def __init__(
        self, path: Path, form: Form, files: Sequence[Path], sizes: Sequence[int], block_sizes: Sequence[int]
    ) -> None:
        self.path = path
        self._form, self._files, self._num_bytes = form, tuple(files), tuple(sizes)
        self._starts = [0, *accumulate(block_sizes)]
        if not len(self):
            raise DataError(f"{path} holds no rows; check that it is the file you mean and was written to its end")

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
        """See `describe_files`."""
        return describe_files(self.path, self._files, self._num_bytes, len(self))

    def read(self, index: int) -> Record:
        """Row `index`. See `Reader.read`; reasons `not_utf8`, those of the form's parser and of damaged files."""
        block = bisect_right(self._starts, index) - 1
        found = self._row(block, index - self._starts[block], index)
        try:
            (row,) = found.to_pylist()
        except UnicodeDecodeError as error:
            raise BadRow("not_utf8", f"row {index} of {self.path}: {error}") from error
        return self._form.parse(row, index)

    @abstractmethod
    def _row(self, block: int, position: int, index: int) -> Any:
        """The columns that are wanted of one row: an Arrow table or batch of one row.

        Args:
            position: in the block.
            index: in the data set, for messages.
        """


def find_form(path: Path, columns: Collection[frozenset[str]]) -> Form:
    """What the rows of files are.

    Args:
        columns: the names of each file's.

    Raises:
        DataError: they differ, or are of no form.
    """
    if len(set(columns)) > 1:
        raise DataError(f"the files of {path} differ in their columns: name those of one kind")
    names = next(iter(columns), frozenset())
    found = next((form for form in FORMS if names.issuperset(form.columns)), None)
    if found is None:
        known = "; ".join(", ".join(form.columns) for form in FORMS)
        raise DataError(f"{path} has the columns {', '.join(sorted(names))}; expected one of: {known}")
    return found


def require_pyarrow(path: Path) -> None:
    """Raises ConfigError where pyarrow, which reads these files, is not installed."""
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{path} needs pyarrow to be read: pip install 'llava-core[parquet]'") from error


def arrow_errors() -> tuple[type[Exception], ...]:
    """What pyarrow raises on files that it cannot read."""
    from pyarrow import ArrowException

    return OSError, ValueError, ArrowException
