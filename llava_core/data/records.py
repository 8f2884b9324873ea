"""Rows of a data set, before any template or tokenizer has seen them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from llava_core.errors import BadRow

IMAGE_MARK = "<image>"

Role = Literal["human", "assistant"]

ROLES: Mapping[object, Role] = {"human": "human", "user": "human", "gpt": "assistant", "assistant": "assistant"}


@dataclass(frozen=True)
class Turn:
    """One message of a conversation. `text` may hold `<image>` marks."""

    role: Role
    text: str


@dataclass(frozen=True)
class Record:
    """One row of a data set.

    Attributes:
        id: the row's own id, or `row-<index>`.
        index: the row's position in its file, from 0.
        turns: the conversation, never empty.
        images: paths relative to the image folder, in the order of the `<image>` marks.
    """

    id: str
    index: int
    turns: tuple[Turn, ...]
    images: tuple[str, ...] = ()


def parse_record(row: object, index: int) -> Record:
    """One row of LLaVA's JSON: `{"id", "image", "conversations": [{"from", "value"}, …]}`.

    `id` may be a number or absent, `image` one path, a list of paths, null or absent; other keys are left alone. The
    order of the turns is the template's business.

    Raises:
        BadRow: `malformed_row`, naming the key.
    """
    if not isinstance(row, dict):
        raise _malformed(index, "", row, "an object with the key 'conversations'")
    row_id = row.get("id")
    if row_id is None:
        row_id = f"row-{index}"
    if isinstance(row_id, bool) or not isinstance(row_id, str | int):
        raise _malformed(index, "id", row_id, "a string or a whole number")
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise _malformed(index, "conversations", turns, "a list with at least one turn")
    return Record(
        id=_parse_text(str(row_id), index, "id"),
        index=index,
        turns=tuple(_parse_turn(turn, index, f"conversations[{i}]") for i, turn in enumerate(turns)),
        images=_parse_images(row.get("image"), index),
    )


def word_length(record: Record) -> int:
    """Words of all turns, split at white space; an `<image>` mark that stands alone counts as one."""
    return sum(len(turn.text.split()) for turn in record.turns)


def modality_length(record: Record) -> int:
    """`word_length`, negative for a row without images: what the original LLaVA groups batches by."""
    return word_length(record) if record.images else -word_length(record)


def _parse_turn(turn: object, index: int, key: str) -> Turn:
    if not isinstance(turn, dict):
        raise _malformed(index, key, turn, "an object with 'from' and 'value'")
    sender = turn.get("from")
    if not isinstance(sender, str) or sender not in ROLES:
        raise _malformed(index, f"{key}.from", sender, f"one of {', '.join(map(repr, ROLES))}")
    return Turn(ROLES[sender], _parse_text(turn.get("value"), index, f"{key}.value"))


def _parse_images(value: object, index: int) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, list):
        paths = tuple(_parse_text(path, index, f"image[{i}]") for i, path in enumerate(value))
    else:
        paths = (_parse_text(value, index, "image"),)
    if "" in paths:
        raise _malformed(index, "image", value, "a path; leave the key out where there is no image")
    return paths


def _parse_text(value: object, index: int, key: str) -> str:
    if not isinstance(value, str):
        raise _malformed(index, key, value, "a string")
    try:
        value.encode("utf-8")  # JSON can spell half of a surrogate pair, which no tokenizer or file name can take
    except UnicodeEncodeError as error:
        raise BadRow("malformed_row", f"row {index}: {key} is not valid Unicode: {error}") from error
    return value


def _malformed(index: int, key: str, value: object, expected: str) -> BadRow:
    found = "missing or null" if value is None else f"{type(value).__name__} {repr(value)[:80]}"
    return BadRow("malformed_row", f"row {index}: {key or 'the row'} is {found}, expected {expected}")
