"""Documents of plain text, to be learnt whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llava_core.data.overlong import Overlong
from llava_core.data.readers import Content
from llava_core.data.readers.index import KEPT_FROM_BYTES, kept_index
from llava_core.data.readers.json_rows import FileRows, JsonRows, index_lines, json_index
from llava_core.data.records import Record, Turn, parse_id, parse_images, parse_object, parse_text
from llava_core.errors import BadRow


class TextReader(FileRows):
    """A UTF-8 text file: each line that is not blank is a document. See `Reader`.

    Raises:
        DataError: missing or empty.
    """

    content: Content = "texts"
    usual_overlong: Overlong = "split"

    def __init__(self, path: Path, *, index_folder: Path | None = None) -> None:
        index = kept_index(index_folder, "lines", [path], lambda: index_lines(path), min_bytes=KEPT_FROM_BYTES)
        super().__init__(path, index)

    def read(self, index: int) -> Record:
        """Row `index`, without its line break. See `Reader.read`; reasons `not_utf8`, `row_too_large`."""
        content = self.read_bytes(index)
        try:
            text = content.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise BadRow("not_utf8", f"row {index} ({self.place(index)}): {error}") from error
        return _document(f"row-{index}", index, text)


class TextJsonReader(JsonRows):
    """`{"text": …}`, one a line or in one JSON list. See `Reader`.

    Raises:
        DataError: missing, empty or not JSON.
    """

    content: Content = "texts"
    usual_overlong: Overlong = "split"

    def __init__(self, path: Path, *, index_folder: Path | None = None) -> None:
        super().__init__(path, json_index(path, index_folder), parse_text_row)


def parse_text_row(row: object, index: int) -> Record:
    """One document, with images in `image` or `images`, if any.

    Raises:
        BadRow: `malformed_row`, naming the key; `empty_document`.
    """
    fields = parse_object(row, index, "text")
    document = _document(parse_id(fields, index), index, parse_text(fields.get("text"), index, "text"))
    return replace(document, images=parse_images(fields, index))


def _document(row_id: str, index: int, text: str) -> Record:
    if not text.strip():
        raise BadRow("empty_document", f"row {index} has no text: remove it")
    return Record(row_id, index, (Turn("assistant", text),))
