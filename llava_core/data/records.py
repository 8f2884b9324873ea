"""Rows of a data set, before any template or tokenizer has seen them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llava_core.errors import BadRow

IMAGE_MARK = "<image>"

IMAGE_KEYS = ("image", "images")

Role = Literal["human", "assistant"]

ROLES: Mapping[object, Role] = {"human": "human", "user": "human", "gpt": "assistant", "assistant": "assistant"}


@dataclass(frozen=True)
class Turn:
    """One message of a conversation. `text` may hold `<image>` marks."""

    role: Role
    text: str


@dataclass(frozen=True)
class EmbeddedImage:
    """An image that its row brings along, as the bytes of an image file. `name` is for messages."""

    name: str
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class Record:
    """One row of a data set as text.

    Attributes:
        id: the row's own id, or `row-<index>`.
        index: the row's position in its file, from 0.
        turns: the conversation, never empty; of a document its text, as the one turn of the assistant.
        images: in the order of the `<image>` marks, paths relative to the image folder or the images themselves.
    """

    id: str
    index: int
    turns: tuple[Turn, ...]
    images: tuple[str | EmbeddedImage, ...] = ()


@dataclass(frozen=True)
class TokenSequence:
    """Token ids that attend to each other.

    Attributes:
        tokens: [T] int64.
        supervised: [T] bool; True where the token is a target.
    """

    tokens: NDArray[np.int64]
    supervised: NDArray[np.bool_]


@dataclass(frozen=True)
class TokenRow:
    """One row of a data set that was tokenised before.

    Attributes:
        id, index: as a `Record`'s.
        sequences: never empty; each becomes a sample of its own.
    """

    id: str
    index: int
    sequences: tuple[TokenSequence, ...]


@dataclass(frozen=True)
class EncodedRecord:
    """A `Record` that a template and a tokenizer have seen before; the images are still to come.

    Attributes:
        id, index, images: as the record's.
        sequence: its tokens, with one in the place of each image; without any where the record was refused.
        image_starts: where these stand.
        modality_length: the record's.
        refused: why it cannot be used.
    """

    id: str
    index: int
    images: tuple[str, ...]
    sequence: TokenSequence
    image_starts: tuple[int, ...]
    modality_length: int
    refused: BadRow | None


Row = Record | TokenRow | EncodedRecord


def parse_record(row: object, index: int) -> Record:
    """One row of LLaVA's JSON: `{"id", "image", "conversations": [{"from", "value"}, …]}`.

    `id` may be a number or absent, `image` one path, a list of paths, null or absent; other keys are left alone. The
    order of the turns is the template's business.

    Raises:
        BadRow: `malformed_row`, naming the key.
    """
    fields = parse_object(row, index, "conversations")
    return Record(
        id=parse_id(fields, index),
        index=index,
        turns=parse_turns(fields.get("conversations"), index, "conversations", ROLES),
        images=_parse_paths(fields.get("image"), index),
    )


def parse_object(row: object, index: int, key: str) -> dict[str, object]:
    """A row that must be an object. Raises BadRow `malformed_row`, which names `key` as what it should have."""
    if not isinstance(row, dict):
        raise malformed(index, "", row, f"an object with the key {key!r}")
    return row


def parse_id(fields: Mapping[str, object], index: int) -> str:
    """The row's `id`, a text or a number, or `row-<index>` where it has none. Raises BadRow `malformed_row`."""
    row_id = fields.get("id")
    if row_id is None:
        return f"row-{index}"
    if isinstance(row_id, bool) or not isinstance(row_id, str | int):
        raise malformed(index, "id", row_id, "a string or a whole number")
    return parse_text(str(row_id), index, "id")


def parse_turns(
    turns: object, index: int, key: str, roles: Mapping[object, Role], *, sender: str = "from", text: str = "value"
) -> tuple[Turn, ...]:
    """A list of messages, each with a `sender` and a `text`.

    Args:
        key: what the row calls the list.
        roles: what a sender may be called.

    Raises:
        BadRow: `malformed_row`, naming the key.
    """
    if not isinstance(turns, list) or not turns:
        raise malformed(index, key, turns, "a list with at least one turn")
    parsed = []
    for number, turn in enumerate(turns):
        where = f"{key}[{number}]"
        if not isinstance(turn, dict):
            raise malformed(index, where, turn, f"an object with {sender!r} and {text!r}")
        role = turn.get(sender)
        if not isinstance(role, str) or role not in roles:
            raise malformed(index, f"{where}.{sender}", role, f"one of {', '.join(map(repr, roles))}")
        parsed.append(Turn(roles[role], parse_text(turn.get(text), index, f"{where}.{text}")))
    return tuple(parsed)


def word_length(record: Record) -> int:
    """Words of all turns, split at white space; an `<image>` mark that stands alone counts as one."""
    return sum(len(turn.text.split()) for turn in record.turns)


def modality_length(row: Row) -> int:
    """`word_length`, negative for a row without images: what the original LLaVA groups batches by.

    Of token ids it is their number.
    """
    if isinstance(row, EncodedRecord):
        return row.modality_length
    if isinstance(row, TokenRow):
        return -sum(sequence.tokens.size for sequence in row.sequences)
    return word_length(row) if row.images else -word_length(row)


def parse_images(row: Mapping[str, object], index: int) -> tuple[str | EmbeddedImage, ...]:
    """The images of a row, of `image` and `images`: a path, the bytes of a file, both of them, or lists of these.

    Both are an object with `bytes` and `path`, as the Hugging Face hub has them; one of nulls is no image.

    Raises:
        BadRow: `malformed_row`, naming the key.
    """
    found = []
    for key in IMAGE_KEYS:
        value = row.get(key)
        for number, image in enumerate(value if isinstance(value, list) else [value]):
            nulls = isinstance(image, dict) and image.get("path") is None and image.get("bytes") is None
            if image is not None and not nulls:
                found.append(_parse_image(image, index, f"{key}[{number}]"))
    return tuple(found)


def _parse_image(image: object, index: int, where: str) -> str | EmbeddedImage:
    path = image.get("path") if isinstance(image, dict) else image
    data = image.get("bytes") if isinstance(image, dict) else image
    name = parse_text(path, index, where) if isinstance(path, str) else ""
    if isinstance(data, bytes):
        return EmbeddedImage(name or f"row {index}, {where}", data)
    if not name:
        raise malformed(index, where, image, "the bytes of an image, or its path")
    return name


def _parse_paths(value: object, index: int) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, list):
        paths = tuple(parse_text(path, index, f"image[{i}]") for i, path in enumerate(value))
    else:
        paths = (parse_text(value, index, "image"),)
    if "" in paths:
        raise malformed(index, "image", value, "a path; leave the key out where there is no image")
    return paths


def parse_text(value: object, index: int, key: str) -> str:
    """A text that can be tokenised. Raises BadRow `malformed_row`, naming the key."""
    if not isinstance(value, str):
        raise malformed(index, key, value, "a string")
    try:
        value.encode("utf-8")  # JSON can spell half of a surrogate pair, which no tokenizer or file name can take
    except UnicodeEncodeError as error:
        raise BadRow("malformed_row", f"row {index}: {key} is not valid Unicode: {error}") from error
    return value


def malformed(index: int, key: str, value: object, expected: str) -> BadRow:
    """The error for a value that is not what was expected; without a key, for the whole row."""
    found = "missing or null" if value is None else f"{type(value).__name__} {repr(value)[:80]}"
    return BadRow("malformed_row", f"row {index}: {key or 'the row'} is {found}, expected {expected}")
