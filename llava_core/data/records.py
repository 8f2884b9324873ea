"""Rows of a data set, before any template or tokenizer has seen them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

IMAGE_MARK = "<image>"

Role = Literal["human", "assistant"]


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
