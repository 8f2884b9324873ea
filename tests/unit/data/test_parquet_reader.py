"""Parquet files that pyarrow wrote: every row of every row group, its images, and files that are refused."""

from __future__ import annotations

import io
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_core.data.image_store import ImageStore
from llava_core.data.readers import reader_name
from llava_core.data.readers.parquet import ParquetReader
from llava_core.data.records import EmbeddedImage, Record
from llava_core.errors import BadRow, ConfigError, DataError
from llava_core.testing.datasets import TinyParts
from tests.unit.data.support import assert_decodes_in_any_order

pyarrow = pytest.importorskip("pyarrow")


def write(path: Path, rows: list[dict[str, Any]], group: int = 2) -> Path:
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
    return path


def said(row: Record) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in row.turns]


def chat(number: int) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{number}?"}, {"from": "gpt", "value": f"{number}."}]
    return {"id": str(number), "conversations": turns, "unused": number}


TALK = {"role": "assistant", "content": "It is red."}
SAID = [("assistant", "It is red.")]


def picture(colour: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 2), (colour, 0, 0)).save(file, "PNG")
    return file.getvalue()


def test_every_row_of_every_group_and_file_from_anywhere(tmp_path: Path) -> None:
    for name, numbers in (("a", range(5)), ("b", range(5, 8))):
        rows = [chat(n) | {"image": {"bytes": picture(n), "path": f"{n}.png"}} for n in numbers]
        write(tmp_path / f"{name}.parquet", rows)
    reader = ParquetReader(tmp_path)
    assert (len(reader), reader.content, reader.fingerprint["num_files"]) == (8, "conversations", 2)
    reader.read(3)  # so that a group is held
    for again in (reader, pickle.loads(pickle.dumps(reader))):
        for number in (7, 0, 4, 5, 1, 6, 2, 3):
            row = again.read(number)
            assert (row.id, row.index) == (str(number), number)
            assert said(row) == [("human", f"<image>\n{number}?"), ("assistant", f"{number}.")]
            assert [ImageStore(None, 100).open(image).getpixel((0, 0)) for image in row.images] == [(number, 0, 0)]
    assert reader_name(tmp_path / "a.parquet") == "parquet"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_read_on_after_the_trainer_has_read(num_workers: int, parts: TinyParts, tmp_path: Path) -> None:
    """pyarrow has threads, which a fork leaves behind."""
    reader = ParquetReader(write(tmp_path / "a.parquet", [{"text": f"Say {n}."} for n in range(40)]))
    reader.read(5)
    assert_decodes_in_any_order(reader, parts, num_workers)


def test_a_held_group_is_not_pickled(tmp_path: Path) -> None:
    reader = ParquetReader(write(tmp_path / "a.parquet", [{"text": "x" * 10_000}]))
    reader.read(0)
    assert len(pickle.dumps(reader)) < 2000


@pytest.mark.parametrize(
    ("row", "content", "expected"),
    [
        ({"text": "a\nb"}, "texts", [("assistant", "a\nb")]),
        ({"instruction": "a", "input": "b", "output": "c"}, "conversations", [("human", "a\nb"), ("assistant", "c")]),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "conversations",
            [("human", "a"), ("assistant", "b")],
        ),
        (chat(1) | {"text": "not this"}, "conversations", [("human", "<image>\n1?"), ("assistant", "1.")]),
    ],
)
def test_the_columns_say_what_rows_are(tmp_path: Path, row: dict[str, Any], content: str, expected: Any) -> None:
    reader = ParquetReader(write(tmp_path / "a.parquet", [row]))
    assert (reader.content, said(reader.read(0))) == (content, expected)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"image": "a.png"}, ("a.png",)),
        ({"image": b"data"}, (EmbeddedImage("row 0, image[0]", b"data"),)),
        ({"image": {"bytes": None, "path": "a.png"}}, ("a.png",)),
        ({"images": [{"bytes": b"1", "path": "x"}, {"bytes": b"2", "path": None}]}, None),
        ({"image": None, "images": []}, ()),
        ({"image": {"bytes": None, "path": None}}, ()),
    ],
)
def test_images_come_in_several_forms(tmp_path: Path, columns: dict[str, Any], expected: Any) -> None:
    found = ParquetReader(write(tmp_path / "a.parquet", [chat(0) | columns])).read(0).images
    wanted = (EmbeddedImage("x", b"1"), EmbeddedImage("row 0, images[1]", b"2")) if expected is None else expected
    assert found == wanted


def test_a_row_that_cannot_be_used_is_set_aside(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": "bad", "image": 5}, {"text": "good", "image": None}]
    reader = ParquetReader(write(tmp_path / "a.parquet", rows))
    with pytest.raises(BadRow, match=r"malformed_row: row 0: image\[0\] is int 5"):
        reader.read(0)
    assert said(reader.read(1)) == [("assistant", "good")]
    with pytest.raises(BadRow, match="malformed_row: row 0: text is missing"):
        ParquetReader(write(tmp_path / "b.parquet", [{"text": None, "id": 1}])).read(0)


def test_a_damaged_row_group_sets_its_rows_aside(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [{"text": f"document {n}"} for n in range(4)])
    content = bytearray(path.read_bytes())
    content[4:60] = bytes(56)  # the first pages; the footer, which opening reads, is whole
    path.write_bytes(content)
    reader = ParquetReader(path)
    with pytest.raises(BadRow, match="broken_row_group: row 1: row group 0"):
        reader.read(1)
    assert said(reader.read(3)) == [("assistant", "document 3")]


def test_files_that_are_no_data_set_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"holds no \.parquet file"):
        ParquetReader(tmp_path)
    path = write(tmp_path / "a.parquet", [{"question": "a", "label": 1}])
    with pytest.raises(DataError, match="has the columns label, question; expected one of: conversations; messages"):
        ParquetReader(path)
    write(tmp_path / "b.parquet", [{"text": "a"}])
    with pytest.raises(DataError, match="differ in their columns"):
        ParquetReader(tmp_path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as a parquet file"):
        ParquetReader(path)
    monkeypatch.setattr("llava_core.data.readers.parquet.MAX_GROUP_BYTES", 10)
    with pytest.raises(DataError, match=r"row group 0 of .*b\.parquet has \d+ bytes"):
        ParquetReader(tmp_path / "b.parquet")


def test_a_file_that_changes_while_in_use_stops_the_run(tmp_path: Path) -> None:
    reader = ParquetReader(write(tmp_path / "a.parquet", [{"text": "a"}]))
    write(tmp_path / "a.parquet", [{"text": "another, and longer"}])
    with pytest.raises(DataError, match="changed while in use"):
        reader.read(0)


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", [{"text": "a"}])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    with pytest.raises(ConfigError, match=r"needs pyarrow to be read: pip install 'llava-core\[parquet\]'"):
        ParquetReader(path)


def test_a_text_that_is_not_utf8_sets_its_row_alone_aside(tmp_path: Path) -> None:
    from pyarrow import parquet

    texts = pyarrow.array([b"good", b"\xff\xfe", b"better"], pyarrow.binary())
    texts = pyarrow.StringArray.from_buffers(3, texts.buffers()[1], texts.buffers()[2])
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    reader = ParquetReader(tmp_path / "a.parquet")
    with pytest.raises(BadRow, match="not_utf8: row 1 of .*a.parquet"):
        reader.read(1)
    assert [said(reader.read(index)) for index in (0, 2)] == [[("assistant", "good")], [("assistant", "better")]]


def test_a_damaged_schema_is_named_whatever_pyarrow_makes_of_it(tmp_path: Path) -> None:
    """Some of its errors are neither OSErrors nor ValueErrors, e.g. of types that it knows and cannot read."""
    path = write(tmp_path / "a.parquet", [{"text": "a", "images": [b"1"], "id": 1}])
    content = path.read_bytes()
    start = content.index(b"ARROW:schema")
    refused = 0
    for position in range(start, len(content) - 8):
        path.write_bytes(content[:position] + bytes([content[position] ^ 11]) + content[position + 1 :])
        try:
            ParquetReader(path)
        except DataError as error:
            refused += "a.parquet" in str(error)
    assert refused > 100


def test_columns_that_are_not_read_do_not_count_to_a_groups_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava_core.data.readers.parquet.MAX_GROUP_BYTES", 1000)
    path = write(tmp_path / "a.parquet", [{"text": "a", "embedding": bytes(range(256)) * 8}])
    assert said(ParquetReader(path).read(0)) == [("assistant", "a")]
    path = write(tmp_path / "b.parquet", [{"text": "a", "image": {"bytes": bytes(range(256)) * 8, "path": None}}])
    with pytest.raises(DataError, match=r"row group 0 of .*b\.parquet has \d+ bytes"):
        ParquetReader(path)


@pytest.mark.parametrize("bit", [0, 7])
def test_a_damaged_footer_is_refused_or_sets_rows_aside(bit: int, tmp_path: Path) -> None:
    """Whichever of its bytes: no row is lost, none is another, and pyarrow, which ends the process where it is asked
    of some of them, is not asked."""
    path = write(tmp_path / "a.parquet", [{"id": str(number), "messages": [TALK]} for number in range(4)])
    content = path.read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    num_read = 0
    for position in range(footer, len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :])
        try:
            reader = ParquetReader(path)
        except DataError:
            continue
        assert len(reader) == 4, position
        for number in range(4):
            try:
                row = reader.read(number)
            except BadRow:
                continue
            num_read += 1
            assert (row.id, said(row)) in ((str(number), SAID), (f"row-{number}", SAID)), position
    assert num_read > 100
