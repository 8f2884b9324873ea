"""Conversations as other tools write them: Alpaca's instructions, and ShareGPT's messages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llava_core.data.overlong import Overlong
from llava_core.data.readers import Content
from llava_core.data.readers.json_rows import JsonRows, json_index
from llava_core.data.records import (
    ROLES,
    Record,
    Role,
    Turn,
    malformed,
    parse_id,
    parse_images,
    parse_object,
    parse_text,
    parse_turns,
)
from llava_core.errors import BadRow

SHAREGPT_ROLES: Mapping[object, Role] = {**ROLES, "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
SYSTEM_ROLE = "system"


class AlpacaReader(JsonRows):
    """`{"instruction", "input", "output"}`, in one JSON list or one a line. See `parse_alpaca`.

    Raises:
        DataError: missing, empty or not JSON.
    """

    content: Content = "conversations"
    usual_overlong: Overlong = "truncate"

    def __init__(self, path: Path, *, index_folder: Path | None = None) -> None:
        super().__init__(path, json_index(path, index_folder), parse_alpaca)


class ShareGptReader(JsonRows):
    """`{"conversations": [{"from", "value"}, …]}` or `{"messages": [{"role", "content"}, …]}`. See `parse_sharegpt`.

    Raises:
        DataError: missing, empty or not JSON.
    """

    content: Content = "conversations"
    usual_overlong: Overlong = "truncate"

    def __init__(self, path: Path, *, index_folder: Path | None = None) -> None:
        super().__init__(path, json_index(path, index_folder), parse_sharegpt)


def parse_alpaca(row: object, index: int) -> Record:
    """One instruction and its output. The question is `instruction`, then, on a line of its own, `input` if any.

    `history`, a list of earlier pairs of question and answer, comes first, as LLaMA-Factory reads it.

    Raises:
        BadRow: `malformed_row`, naming the key; `system_message`.
    """
    fields = parse_object(row, index, "instruction")
    question = parse_text(fields.get("instruction"), index, "instruction")
    if more := parse_text(fields.get("input") or "", index, "input"):
        question = f"{question}\n{more}" if question else more
    if fields.get(SYSTEM_ROLE):
        raise _system_message(index)
    turns = _history(fields.get("history") or [], index)
    turns += [Turn("human", question), Turn("assistant", parse_text(fields.get("output"), index, "output"))]
    return Record(parse_id(fields, index), index, tuple(turns), parse_images(fields, index))


def parse_sharegpt(row: object, index: int) -> Record:
    """One conversation, in ShareGPT's keys or in those of chat messages.

    Raises:
        BadRow: `malformed_row`, naming the key; `system_message`.
    """
    fields = parse_object(row, index, "conversations")
    if "messages" in fields and "conversations" not in fields:
        key, sender, text = "messages", "role", "content"
    else:
        key, sender, text = "conversations", "from", "value"
    turns = fields.get(key)
    in_turns = isinstance(turns, list) and any(isinstance(t, dict) and t.get(sender) == SYSTEM_ROLE for t in turns)
    if in_turns or fields.get(SYSTEM_ROLE):
        raise _system_message(index)
    parsed = parse_turns(turns, index, key, SHAREGPT_ROLES, sender=sender, text=text)
    return Record(parse_id(fields, index), index, parsed, parse_images(fields, index))


def _history(pairs: object, index: int) -> list[Turn]:
    if not isinstance(pairs, list):
        raise malformed(index, "history", pairs, "a list of pairs of question and answer")
    turns = []
    for number, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2:
            raise malformed(index, f"history[{number}]", pair, "a pair of question and answer")
        turns.append(Turn("human", parse_text(pair[0], index, f"history[{number}][0]")))
        turns.append(Turn("assistant", parse_text(pair[1], index, f"history[{number}][1]")))
    return turns


def _system_message(index: int) -> BadRow:
    return BadRow(
        "system_message",
        f"row {index} has a system message, and conversation templates write their own: take it out of the row",
    )
