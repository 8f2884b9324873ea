"""Readers: every row of a file, a bad row alone, and a bad file with the place and the remedy."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_core.data.readers import Reader, ReaderFactory, open_reader
from llava_core.data.readers.index import describe_files
from llava_core.data.readers.llava import LlavaJsonlReader, LlavaJsonReader
from llava_core.errors import BadRow, ConfigError, DataError

REGISTRY: dict[str, ReaderFactory] = {"llava_json": LlavaJsonReader, "llava_jsonl": LlavaJsonlReader}


def row(i: int, text: str = "yes") -> dict[str, object]:
    turns = [{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": text}]
    return {"id": f"id-{i}", "image": f"{i}.jpg", "conversations": turns}


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def texts(reader: Reader) -> list[str]:
    return [reader.read(i).turns[1].text for i in range(len(reader))]


@settings(max_examples=60)
@given(
    answers=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=8),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 0, 2]),
    bom=st.sampled_from([b"", b"\xef\xbb\xbf"]),
    newline=st.sampled_from(["\n", "\r\n", "\n\n \t\n"]),
)
def test_both_forms_give_what_json_gives(
    tmp_path_factory: pytest.TempPathFactory,
    answers: list[str],
    ascii_only: bool,
    indent: int | None,
    bom: bytes,
    newline: str,
) -> None:
    folder = tmp_path_factory.mktemp("data")
    rows = [row(i, answer) for i, answer in enumerate(answers)]
    as_list = json.dumps(rows, ensure_ascii=ascii_only, indent=indent)
    as_lines = newline.join(json.dumps(r, ensure_ascii=ascii_only) for r in rows) + newline
    for name, content in (("a.json", as_list), ("a.jsonl", as_lines)):
        path = write(folder / name, bom + content.encode())
        reader = open_reader(path, None, REGISTRY)
        assert texts(reader) == answers
        assert [reader.read(i).index for i in range(len(reader))] == list(range(len(rows)))
        assert reader.fingerprint == {"path": str(path), "num_bytes": path.stat().st_size, "num_rows": len(rows)}


def test_far_from_the_start_a_bad_row_is_named_by_its_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counting the lines of a large file for each of its bad rows would read it over and over."""
    monkeypatch.setattr("llava_core.data.readers.json_rows.MAX_COUNTED_BYTES", 5)
    path = write(tmp_path / "a.jsonl", "{\n[}]\n\n[}]\n")
    with pytest.raises(BadRow, match=r"row 1 \(line 2 of .*a.jsonl\)"):
        LlavaJsonlReader(path).read(1)
    with pytest.raises(BadRow, match=r"row 2 \(byte 7 of .*a.jsonl\)") as raised:
        LlavaJsonlReader(path).read(2)
    assert path.read_bytes()[int(raised.value.message.split("byte ")[1].split()[0]) :] == b"[}]\n"


def test_several_files_are_told_apart_by_each_ones_size(tmp_path: Path) -> None:
    files = [tmp_path / "a" / "1.tar", tmp_path / "a" / "2.tar"]
    facts = describe_files(tmp_path / "a", files, [10, 20], 5)
    assert (facts["num_bytes"], facts["num_rows"], facts["num_files"]) == (30, 5, 2)
    assert describe_files(tmp_path / "a", files, [20, 10], 5) != facts
    assert describe_files(tmp_path / "a", [files[0], files[0].with_name("3.tar")], [10, 20], 5) != facts
    moved = [Path("b") / file.name for file in files]
    assert describe_files(Path("b"), moved, [10, 20], 5) == facts | {"path": "b"}
    one = [describe_files(path, [path], [10], 5) for path in files]
    assert one[0] == one[1] | {"path": str(files[0])}


def test_duplicate_ids_are_allowed(tmp_path: Path) -> None:
    reader = LlavaJsonReader(write(tmp_path / "a.json", json.dumps([row(1), row(1)])))
    assert [reader.read(i).id for i in (0, 1)] == ["id-1", "id-1"]


def test_a_malformed_line_is_one_bad_row(tmp_path: Path) -> None:
    lines = [json.dumps(row(0)), "", '{"id": ', json.dumps(row(1)), json.dumps("text")]
    reader = LlavaJsonlReader(write(tmp_path / "a.jsonl", "\n".join(lines)))
    assert len(reader) == 4
    with pytest.raises(BadRow, match=r"malformed_json: row 1 \(line 3 of .*a.jsonl\)"):
        reader.read(1)
    assert reader.read(2).id == "id-1"
    with pytest.raises(BadRow, match="malformed_row: row 3"):
        reader.read(3)


@pytest.mark.parametrize("line", [b'{"id": "\xff"}', b"[" * 100_000, b"9" * 5000, b'{"id": 1} {"id": 2}'])
def test_what_json_cannot_take_is_a_bad_row(tmp_path: Path, line: bytes) -> None:
    reader = LlavaJsonlReader(write(tmp_path / "a.jsonl", line + b"\n" + json.dumps(row(1)).encode()))
    with pytest.raises(BadRow, match="malformed_json"):
        reader.read(0)
    assert reader.read(1).id == "id-1"


def test_a_row_of_a_list_that_is_not_utf8_is_a_bad_row(tmp_path: Path) -> None:
    content = json.dumps([row(0, "XX"), row(1)]).encode().replace(b"XX", b"\xff\xfe")
    reader = LlavaJsonReader(write(tmp_path / "a.json", content))
    with pytest.raises(BadRow, match="malformed_json: row 0"):
        reader.read(0)
    assert reader.read(1).id == "id-1"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("[]", "no rows"),
        ('{"id": 1}\n{"id": 2}', "choose the reader llava_jsonl"),
        ("3", "starts with '3'"),
        ("\ufeff[]".encode("utf-16"), "must be UTF-8"),
        ('[{"a": 1},\n {"b": x}]', r"line 2, column 8 \(row 1\): not JSON: Expecting value"),
        ('[{"a": "é"}, x]', r"line 1, column 14 \(row 1\)"),
        ('[{"a": 1}', "the file ends there"),
        ('[{"a": 1},', "the file ends there"),
        ('[{"a": "', "Unterminated string"),
        ('[{"a": 1} {"b": 2}]', r"column 11 \(row 1\): not JSON: expected ',' or '\]'"),
        ('[{"a": 1},]', "column 11"),
        ("[1] x", "more after the list's end"),
        ("[" * 100_000, r"row 0"),
    ],
)
def test_a_bad_list_names_the_place_and_the_remedy(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = write(tmp_path / "a.json", content)
    with pytest.raises(DataError, match=message) as caught:
        LlavaJsonReader(path)
    assert str(path) in str(caught.value)
    assert not isinstance(caught.value, BadRow)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_lines(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match="no rows"):
        LlavaJsonlReader(write(tmp_path / "a.jsonl", content))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_missing_file_and_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="No such file"):
        open_reader(tmp_path / name, None, REGISTRY)
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match="directory"):
        open_reader(tmp_path / name, None, REGISTRY)


def test_a_file_that_grows_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps(row(0)) + "\n")
    reader = LlavaJsonlReader(path)
    with path.open("a") as file:
        file.write(json.dumps(row(1)) + "\n")
    with pytest.raises(DataError, match="changed while in use") as caught:
        reader.read(0)
    assert not isinstance(caught.value, BadRow)


def test_reader_is_chosen_by_suffix_or_name(tmp_path: Path) -> None:
    lines = write(tmp_path / "a.JSONL", json.dumps(row(0)))
    assert isinstance(open_reader(lines, None, REGISTRY), LlavaJsonlReader)
    assert isinstance(open_reader(write(tmp_path / "a.txt", "[1]"), "llava_json", REGISTRY), LlavaJsonReader)
    with pytest.raises(ConfigError, match=r"suffix is '.csv'.*llava_json, llava_jsonl"):
        open_reader(tmp_path / "a.csv", None, REGISTRY)
    with pytest.raises(ConfigError, match="no reader 'parquet'; there are llava_json, llava_jsonl"):
        open_reader(lines, "parquet", REGISTRY)


def read_all(reader: Reader) -> list[str]:
    return [reader.read(i).id for i in list(range(len(reader))) * 20]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_many_processes_read_at_once(tmp_path: Path, name: str) -> None:
    rows = [row(i, "x" * (i * 37 % 500)) for i in range(50)]
    content = json.dumps(rows) if name == "a.json" else "\n".join(map(json.dumps, rows))
    reader = open_reader(write(tmp_path / name, content), None, REGISTRY)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(read_all, [reader] * 4) == [[f"id-{i}" for i in range(50)] * 20] * 4


def test_a_reader_is_small(tmp_path: Path) -> None:
    """16 bytes a row, whatever the rows hold: this is what each worker process gets."""
    reader = LlavaJsonReader(write(tmp_path / "a.json", json.dumps([row(i, "x" * 2000) for i in range(1000)])))
    assert len(pickle.dumps(reader)) < 16 * 1000 + 1000
