"""Documents, Alpaca and ShareGPT: what each row becomes, and which rows are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_core.data.readers import Reader
from llava_core.data.readers.index import kept_index
from llava_core.data.readers.instructions import AlpacaReader, ShareGptReader
from llava_core.data.readers.json_rows import BLOCK_BYTES, MAX_ROW_BYTES, JsonRows, index_lines, json_index
from llava_core.data.readers.text import TextJsonReader, TextReader
from llava_core.data.records import Record, Row
from llava_core.errors import BadRow, DataError


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def said(row: Row) -> list[tuple[str, str]]:
    assert isinstance(row, Record)
    return [(turn.role, turn.text) for turn in row.turns]


def documents(reader: Reader) -> list[str]:
    rows = [said(reader.read(i)) for i in range(len(reader))]
    assert all(len(row) == 1 and row[0][0] == "assistant" for row in rows)
    return [row[0][1] for row in rows]


LINE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r"), min_size=1, max_size=9)


@settings(max_examples=60)
@given(st.lists(LINE.filter(str.strip), min_size=1, max_size=6), st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\n"]))
def test_each_line_that_is_not_blank_is_a_document(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], newline: str
) -> None:
    path = write(tmp_path_factory.mktemp("text") / "a.txt", newline.join(lines))
    assert documents(TextReader(path)) == lines
    assert documents(TextReader(write(path, b"\xef\xbb\xbf" + newline.join([*lines, ""]).encode()))) == lines


def test_lines_of_any_length_are_found(tmp_path: Path) -> None:
    long = "ab" * (BLOCK_BYTES // 2)
    lines = ["x", long, "y", long + long + "z", " " * (BLOCK_BYTES + 5), long[1:], "w"]
    expected = [line for line in lines if line.strip()]
    assert documents(TextReader(write(tmp_path / "a.txt", "\n".join(lines)))) == expected


@pytest.mark.parametrize("lines", [True, False])
def test_documents_of_json_in_lines_or_in_a_list(tmp_path: Path, lines: bool) -> None:
    rows = [{"text": "one\ntwo"}, {"id": 7, "text": "  three", "meta": 1}]
    content = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows, indent=1)
    reader = TextJsonReader(write(tmp_path / "a.json", content))
    assert documents(reader) == ["one\ntwo", "  three"]
    assert [reader.read(i).id for i in (0, 1)] == ["row-0", "7"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"txt": "a"}, "malformed_row: row 0: text is missing"),
        ({"text": ["a"]}, "malformed_row: row 0: text is list"),
        ({"text": " \n"}, "empty_document"),
        ("text", "malformed_row: row 0: the row is str"),
    ],
)
def test_what_is_no_document_is_a_bad_row(tmp_path: Path, row: object, reason: str) -> None:
    reader = TextJsonReader(write(tmp_path / "a.jsonl", json.dumps(row) + '\n{"text": "good"}'))
    with pytest.raises(BadRow, match=reason):
        reader.read(0)
    assert reader.read(1).index == 1


def test_a_line_that_is_not_utf8_is_a_bad_row_with_its_place(tmp_path: Path) -> None:
    reader = TextReader(write(tmp_path / "a.txt", b"good\n\n\xff\xfe\nbetter\n"))
    with pytest.raises(BadRow, match=r"not_utf8: row 1 \(line 3 of .*a.txt\)"):
        reader.read(1)
    assert said(reader.read(2)) == [("assistant", "better")]


def test_a_huge_row_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with path.open("wb") as file:
        file.write(b"good\n")
        for _ in range(MAX_ROW_BYTES // BLOCK_BYTES + 1):
            file.write(b"x" * BLOCK_BYTES)
        file.write(b"\nbetter\n")
    reader = TextReader(path)
    with pytest.raises(BadRow, match="row_too_large: row 1 has 68157441 bytes"):
        reader.read(1)
    assert said(reader.read(2)) == [("assistant", "better")]


ALPACA: list[tuple[dict[str, Any], list[str]]] = [
    ({"instruction": "Add.", "input": "1 1", "output": "2"}, ["Add.\n1 1", "2"]),
    ({"instruction": "Greet.", "input": "", "output": "Hi"}, ["Greet.", "Hi"]),
    ({"instruction": "Greet.", "output": "Hi", "system": ""}, ["Greet.", "Hi"]),
    ({"instruction": "", "input": "Hello", "output": "Hi"}, ["Hello", "Hi"]),
    ({"instruction": "c", "output": "d", "history": [["a", "b"]]}, ["a", "b", "c", "d"]),
]


def test_alpaca_rows_become_questions_and_answers(tmp_path: Path) -> None:
    rows = [row for row, _ in ALPACA]
    as_list = AlpacaReader(write(tmp_path / "a.json", json.dumps(rows)))
    as_lines = AlpacaReader(write(tmp_path / "b.json", "\n".join(map(json.dumps, rows))))
    for index, (_, texts) in enumerate(ALPACA):
        expected = [("assistant" if number % 2 else "human", text) for number, text in enumerate(texts)]
        assert said(as_list.read(index)) == said(as_lines.read(index)) == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"input": "a", "output": "b"}, "instruction is missing"),
        ({"instruction": "a"}, "output is missing"),
        ({"instruction": "a", "output": 3}, "output is int 3"),
        ({"instruction": "a", "output": "b", "input": 4}, "input is int 4"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, r"history\[0\] is list"),
        ({"instruction": "a", "output": "b", "history": "c"}, "history is str"),
        ({"instruction": "a", "output": "b", "system": "Be rude."}, "system_message"),
    ],
)
def test_what_is_no_instruction_is_a_bad_row(tmp_path: Path, row: object, reason: str) -> None:
    reader = AlpacaReader(write(tmp_path / "a.json", json.dumps([row])))
    with pytest.raises(BadRow, match=reason):
        reader.read(0)


def test_sharegpt_rows_in_either_form(tmp_path: Path) -> None:
    rows = [
        {"id": "q1", "conversations": [{"from": "human", "value": "a"}, {"from": "bard", "value": "b"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ]
    reader = ShareGptReader(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))))
    assert said(reader.read(0)) == said(reader.read(1)) == [("human", "a"), ("assistant", "b")]
    assert [reader.read(i).id for i in (0, 1)] == ["q1", "row-1"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}]}, "system_message"),
        ({"system": "s", "conversations": [{"from": "human", "value": "a"}]}, "system_message"),
        ({"messages": [{"role": "tool", "content": "a"}]}, r"messages\[0\].role is str 'tool'"),
        ({"messages": [{"role": "user", "content": [1]}]}, r"messages\[0\].content is list"),
        ({}, "conversations is missing"),
    ],
)
def test_what_sharegpt_rows_cannot_hold_is_a_bad_row(tmp_path: Path, row: object, reason: str) -> None:
    reader = ShareGptReader(write(tmp_path / "a.json", json.dumps([row])))
    with pytest.raises(BadRow, match=reason):
        reader.read(0)


IMAGES: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"image": "a.png"}, ("a.png",)),
    ({"image": None, "images": ["a.png", "b.png"]}, ("a.png", "b.png")),
    ({"images": [{"path": "a.png", "bytes": None}]}, ("a.png",)),
    ({}, ()),
]


@pytest.mark.parametrize(
    ("reader", "row"),
    [
        (AlpacaReader, {"instruction": "<image> a", "output": "b"}),
        (
            ShareGptReader,
            {"messages": [{"role": "user", "content": "<image> a"}, {"role": "assistant", "content": "b"}]},
        ),
        (TextJsonReader, {"text": "<image> a"}),
    ],
)
def test_images_of_json_rows(tmp_path: Path, reader: type[JsonRows], row: dict[str, Any]) -> None:
    rows = reader(write(tmp_path / "a.json", json.dumps([row | images for images, _ in IMAGES])))  # type: ignore[call-arg]
    assert [rows.read(index).images for index in range(len(IMAGES))] == [expected for _, expected in IMAGES]
    bad = reader(write(tmp_path / "b.json", json.dumps([row | {"images": ["a.png", 5]}])))  # type: ignore[call-arg]
    with pytest.raises(BadRow, match=r"images\[1\] is int 5"):
        bad.read(0)


def test_an_index_is_kept_until_its_file_changes(tmp_path: Path) -> None:
    path, folder = write(tmp_path / "a.jsonl", '{"text": "a"}\n'), tmp_path / "index"
    made = []

    def build() -> Any:
        made.append(path.stat().st_size)
        return index_lines(path)

    for _ in range(3):
        index = kept_index(folder, "lines", [path], build, min_bytes=1)
        assert index.tolist() == [[0], [14]]
    write(path, '{"text": "a"}\n{"text": "b"}\n')
    assert kept_index(folder, "lines", [path], build, min_bytes=1).tolist() == [[0, 14], [14, 14]]
    assert made == [14, 28]
    assert sorted(file.suffix for file in folder.iterdir()) == [".npy", ".npy"], "and nothing half-written"


def test_a_small_files_index_is_not_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n')
    json_index(path, tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    path, folder = write(tmp_path / "a.jsonl", '{"text": "a"}\n'), tmp_path / "index"
    kept_index(folder, "lines", [path], lambda: index_lines(path), min_bytes=1)
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(DataError, match=f"{file.name} cannot be read.*remove it"):
        kept_index(folder, "lines", [path], lambda: index_lines(path), min_bytes=1)
