"""Files of prompts, and of answers.

A prompts file has one JSON object a line, or one JSON list if it is named `.json`. A row is either of

    {"id": …, "question": …, "image": …}           `prompt` and `text` also name the question, `question_id` the id
    {"id": …, "conversations": […], "image": …}    LLaVA's rows; a last answer is the reference, not part of the prompt

`id` and `image` may be left out; `image` is a path or a list of paths, relative to the image folder. A question with an
image but without an `<image>` mark gets one in front.

An answers file has one JSON object a line, in the order of the prompts: `id`, `question`, `answer`, `tokens` (their
number), `finish` (`stop`, or `length` where `max_new_tokens` cut it) and `reference` if there was one; or `id` and
`error`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from llava_core.data.examples import Rejected
from llava_core.data.records import IMAGE_MARK, EmbeddedImage, Turn, parse_record
from llava_core.errors import BadRow, ConfigError, DataError

Finish: TypeAlias = Literal["stop", "length"]

QUESTION_KEYS = ("question", "prompt", "text")
ID_KEYS = ("id", "question_id")


@dataclass(frozen=True)
class PromptRow:
    """One row of a prompts file.

    Attributes:
        turns: the last one is a human's.
        images: paths relative to the image folder.
        reference: the answer that the row itself gives.
    """

    id: str
    index: int
    turns: tuple[Turn, ...]
    images: tuple[str | EmbeddedImage, ...] = ()
    reference: str | None = None

    @property
    def question(self) -> str:
        return self.turns[-1].text


@dataclass(frozen=True)
class Answer:
    """The answer to a row. `tokens` counts the end token, too."""

    id: str
    question: str
    answer: str
    tokens: int
    finish: Finish
    reference: str | None = None


def read_prompts(path: Path) -> Iterator[PromptRow | Rejected]:
    """Every row of a prompts file, in order; one that cannot be used comes as a `Rejected`.

    Raises:
        DataError: the file cannot be read, or has no rows.
    """
    index = -1
    for index, text in enumerate(_rows(path)):
        try:
            row = json.loads(text) if isinstance(text, bytes) else text
        except (ValueError, RecursionError) as error:
            yield Rejected(f"row-{index}", index, "malformed_json", f"row {index} of {path}: {error}")
            continue
        try:
            yield parse_prompt(row, index)
        except BadRow as bad:
            yield Rejected(_row_id(row, index), index, bad.reason, bad.message)
    if index < 0:
        raise DataError(f"{path} holds no prompts; expected one JSON object a line.")


def parse_prompt(row: object, index: int) -> PromptRow:
    """One row of a prompts file.

    Raises:
        BadRow: `malformed_row`, naming the key.
    """
    if not isinstance(row, dict):
        raise BadRow("malformed_row", f"row {index} is {type(row).__name__}, expected an object")
    asked = [key for key in (*QUESTION_KEYS, "conversations") if key in row]
    if len(asked) != 1:
        known = ", ".join(QUESTION_KEYS)
        raise BadRow("malformed_row", f"row {index} has {asked}; expected one of {known}, or conversations")
    fields = {"id": next((row[key] for key in ID_KEYS if key in row), None), "image": row.get("image")}
    if asked == ["conversations"]:
        record = parse_record(fields | {"conversations": row["conversations"]}, index)
        turns, last = record.turns, record.turns[-1]
        if last.role == "assistant":
            return PromptRow(record.id, index, turns[:-1], record.images, last.text)
        return PromptRow(record.id, index, turns, record.images)
    record = parse_record(fields | {"conversations": [{"from": "human", "value": row[asked[0]]}]}, index)
    return PromptRow(record.id, index, (mark_image(record.turns[0].text, bool(record.images)),), record.images)


def mark_image(question: str, has_image: bool) -> Turn:
    """A question as a turn, with an `<image>` mark if it has an image and no mark."""
    marked = has_image and IMAGE_MARK not in question
    return Turn("human", f"{IMAGE_MARK}\n{question}" if marked else question)


def check_answers_path(path: Path) -> None:
    """Whether an answers file can be written, asked before the work for it is done. Makes nothing.

    Raises:
        ConfigError: a folder, or another thing that is no file, has its name; or what should be its folder is none.
    """
    for file in (path, _partial(path)):
        if file.exists() and not file.is_file():
            raise ConfigError(f"the answers file {file} is {'a folder' if file.is_dir() else 'no file'}; name a file.")
    folder = next((parent for parent in path.parents if parent.exists()), path.parent)
    if not folder.is_dir():
        raise ConfigError(f"the answers file {path} would lie under {folder}, which is no folder.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"the answers file {path} cannot be written: {folder} is closed to you.")


def write_answers(path: Path, results: Iterable[Answer | Rejected]) -> tuple[int, int]:
    """Writes an answers file; the numbers of answers and of errors.

    Each line leaves the process when its answer is there, into `<path>.partial`, which takes the name `path` when the
    last one is: a file of that name is complete. A run that is cut short starts anew.
    """
    partial = _partial(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    num_answers = num_errors = 0
    with partial.open("w", encoding="utf-8") as file:
        for result in results:
            file.write(json.dumps(_line(result), ensure_ascii=False) + "\n")
            file.flush()
            if isinstance(result, Answer):
                num_answers += 1
            else:
                num_errors += 1
        os.fsync(file.fileno())
    os.replace(partial, path)
    return num_answers, num_errors


def _partial(path: Path) -> Path:
    return path.parent / f"{path.name}.partial"


def _line(result: Answer | Rejected) -> dict[str, Any]:
    if isinstance(result, Rejected):
        return {"id": result.id, "error": f"{result.reason}: {result.message}"}
    return {key: value for key, value in asdict(result).items() if value is not None}


def _rows(path: Path) -> Iterator[object]:
    """The lines that are not blank, as bytes; or the elements of the list."""
    try:
        with path.open("rb") as file:
            if path.suffix.lower() != ".json":
                yield from (line.removeprefix(b"\xef\xbb\xbf") for line in file if line.strip())
                return
            rows = json.load(file)
    except (OSError, ValueError) as error:
        raise DataError(f"the prompts file {path} cannot be read: {error}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path} must hold a JSON list of rows; name it .jsonl if it has one row a line.")
    yield from rows


def _row_id(row: object, index: int) -> str:
    found = next((row[key] for key in ID_KEYS if key in row), None) if isinstance(row, dict) else None
    return str(found) if isinstance(found, str | int) else f"row-{index}"
