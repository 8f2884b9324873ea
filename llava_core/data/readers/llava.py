"""LLaVA's own data files: one JSON list of rows, or one row a line."""

from __future__ import annotations

from pathlib import Path

from llava_core.data.overlong import Overlong
from llava_core.data.readers import Content
from llava_core.data.readers.json_rows import JsonRows, json_index
from llava_core.data.records import parse_record


class LlavaJsonReader(JsonRows):
    """A JSON file that holds one list of rows.

    Raises:
        DataError: missing, empty, not a list, or not JSON; with the path, line and column.
    """

    content: Content = "conversations"
    usual_overlong: Overlong = "truncate"

    def __init__(self, path: Path, *, index_folder: Path | None = None) -> None:
        super().__init__(path, json_index(path, index_folder, lines=False), parse_record)


class LlavaJsonlReader(JsonRows):
    """A file with one JSON row a line; blank lines are not rows.

    Raises:
        DataError: missing or empty. A malformed line is a bad row when it is read.
    """

    content: Content = "conversations"
    usual_overlong: Overlong = "truncate"

    def __init__(self, path: Path, *, index_folder: Path | None = None) -> None:
        super().__init__(path, json_index(path, index_folder, lines=True), parse_record)
