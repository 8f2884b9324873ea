from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from llava_core.data.examples import Rejected
from llava_core.data.records import Turn
from llava_core.errors import DataError
from llava_core.inference.prompts import Answer, PromptRow, read_prompts, write_answers

CONVERSATION = [{"from": "human", "value": "<image>\na"}, {"from": "gpt", "value": "b"}]
ROWS = [
    {"id": 7, "question": "What?", "image": "a.png"},
    {"prompt": "Who? <image>", "image": ["b.png"]},
    {"question_id": 3, "text": "Why?", "category": "x"},
    {"id": "c", "image": "c.png", "conversations": CONVERSATION},
    {"id": "d", "image": "c.png", "conversations": [*CONVERSATION, {"from": "human", "value": "e"}]},
]
EXPECTED = [
    PromptRow("7", 0, (Turn("human", "<image>\nWhat?"),), ("a.png",)),
    PromptRow("row-1", 1, (Turn("human", "Who? <image>"),), ("b.png",)),
    PromptRow("3", 2, (Turn("human", "Why?"),)),
    PromptRow("c", 3, (Turn("human", "<image>\na"),), ("c.png",), "b"),
    PromptRow("d", 4, (Turn("human", "<image>\na"), Turn("assistant", "b"), Turn("human", "e")), ("c.png",)),
]


def test_every_row_is_read(tmp_path: Path) -> None:
    lines, whole = tmp_path / "p.jsonl", tmp_path / "p.json"
    lines.write_text("\ufeff" + "\n\n".join(json.dumps(row) for row in ROWS))
    whole.write_text(json.dumps(ROWS))
    assert list(read_prompts(lines)) == EXPECTED
    assert list(read_prompts(whole)) == EXPECTED


def test_bad_rows_come_out_in_their_place(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    bad = ['{"id": "x", "question": 1}', "{", "[1]", '{"id": "y"}', '{"question": "a", "prompt": "b"}', '"\\ud800"']
    path.write_text("\n".join([json.dumps(ROWS[0]), *bad, json.dumps(ROWS[2])]))
    found = list(read_prompts(path))
    assert [type(row) for row in found] == [PromptRow, *[Rejected] * 6, PromptRow]
    assert [(row.id, row.index) for row in found if isinstance(row, Rejected)] == [
        ("x", 1), ("row-2", 2), ("row-3", 3), ("y", 4), ("row-5", 5), ("row-6", 6),
    ]  # fmt: skip
    reasons = [row.reason for row in found if isinstance(row, Rejected)]
    assert reasons == ["malformed_row", "malformed_json", *["malformed_row"] * 4]


def test_a_file_that_is_no_prompts_file(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n \n")
    (tmp_path / "object.json").write_text("{}")
    (tmp_path / "broken.json").write_text("[")
    for name, message in (
        ("empty.jsonl", "no prompts"), ("object.json", "list"), ("broken.json", "cannot be read"), ("none", "No such"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            list(read_prompts(tmp_path / name))


def test_answers_are_written_as_they_come_and_named_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "answers.jsonl"
    partial = path.with_name("answers.jsonl.partial")

    def results() -> Iterator[Answer | Rejected]:
        yield Answer("a", "What?", "é", 2, "stop", "ref")
        assert json.loads(partial.read_text())["answer"] == "é"
        assert not path.exists()
        yield Rejected("b", 1, "missing_image", "no such file")
        yield Answer("c", "Why?", "", 1, "length")

    assert write_answers(path, results()) == (2, 1)
    assert not partial.exists()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"id": "a", "question": "What?", "answer": "é", "tokens": 2, "finish": "stop", "reference": "ref"},
        {"id": "b", "error": "missing_image: no such file"},
        {"id": "c", "question": "Why?", "answer": "", "tokens": 1, "finish": "length"},
    ]
