"""Folders that three releases of Hugging Face's datasets saved, beside what each of them read; and damaged ones."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from llava_core.data.image_store import ImageStore
from llava_core.data.readers import open_reader, reader_name
from llava_core.data.readers.saved_datasets import SavedDatasetReader
from llava_core.data.records import EmbeddedImage, Record
from llava_core.errors import BadRow, ConfigError, DataError
from llava_core.testing.datasets import TinyParts
from tests.unit.data.support import assert_decodes_in_any_order

pyarrow = pytest.importorskip("pyarrow")

GOLDEN = Path(__file__).parents[2] / "golden" / "datasets"
RELEASES = ("1.18.4", "2.14.7", "5.2.0")


def said(row: Record) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in row.turns]


def as_the_library_reads(row: Record, expected: dict[str, Any]) -> None:
    roles = {"human": "human", "gpt": "assistant"}
    assert row.id == expected["id"]
    assert said(row) == [(roles[turn["from"]], turn["value"]) for turn in expected["conversations"]]
    pixels = [list(ImageStore(None, 100).open(image).getpixel((0, 0))) for image in row.images]
    assert pixels == ([expected["image"]] if expected.get("image") else [])


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_row_is_what_the_library_itself_read(release: str, split: str) -> None:
    expected = json.loads((GOLDEN / f"{release}.json").read_text())[split]
    reader = SavedDatasetReader(GOLDEN / release, split=split)
    assert (len(reader), reader.content) == (len(expected), "conversations")
    for again in (reader, pickle.loads(pickle.dumps(reader))):
        for number in [*reversed(range(len(expected))), *range(len(expected))]:
            row = again.read(number)
            assert row.index == number
            as_the_library_reads(row, expected[number])


@pytest.mark.parametrize("release", RELEASES[1:])
def test_one_data_set_without_splits(release: str) -> None:
    expected = json.loads((GOLDEN / f"{release}.json").read_text())["test"]
    reader = SavedDatasetReader(GOLDEN / release / "alone")
    assert len(reader) == 2
    for number in range(2):
        as_the_library_reads(reader.read(number), expected[number])
    with pytest.raises(DataError, match="split = 'test': .*alone is one data set without splits"):
        SavedDatasetReader(GOLDEN / release / "alone", split="test")


def test_a_folder_is_recognised_and_its_usual_split_is_train() -> None:
    folder = GOLDEN / "5.2.0"
    assert reader_name(folder) == reader_name(folder / "alone") == "datasets"
    reader = open_reader(folder, None, {"datasets": SavedDatasetReader})
    assert len(reader) == 6
    assert reader.fingerprint["split"] == "train"
    with pytest.raises(DataError, match="no split 'dev'; there are: train, test"):
        SavedDatasetReader(folder, split="dev")


@pytest.mark.parametrize("release", RELEASES)
def test_an_index_that_was_kept_says_the_same(release: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_core.data.readers.saved_datasets.KEPT_FROM_BYTES", 1)
    for _ in range(2):
        reader = SavedDatasetReader(GOLDEN / release, index_folder=tmp_path)
        ids = [reader.read(number).id for number in range(len(reader))]
        assert ids == [row["id"] for row in json.loads((GOLDEN / f"{release}.json").read_text())["train"]]
    assert len(list(tmp_path.iterdir())) == 1


def save(folder: Path, table: Any, batch: int = 2, **state: object) -> Path:
    """A folder as the library saves it, of columns that pyarrow made."""
    folder.mkdir(parents=True)
    with pyarrow.ipc.new_stream(str(folder / "data.arrow"), table.schema) as stream:
        stream.write_table(table, max_chunksize=batch)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}], **state}))
    return folder


def test_images_in_lists_and_columns_that_set_format_hid(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes."}]
    images = [{"bytes": b"1", "path": "x"}, {"bytes": None, "path": "y.png"}]
    table = pyarrow.Table.from_pylist([{"conversations": turns, "images": images, "text": "no"}])
    row = SavedDatasetReader(save(tmp_path / "all", table)).read(0)
    assert (said(row)[0], row.images) == (("human", "Hi"), (EmbeddedImage("x", b"1"), "y.png"))
    reader = SavedDatasetReader(save(tmp_path / "some", table, _format_columns=["text"]))
    assert (reader.content, said(reader.read(0)), reader.read(0).images) == ("texts", [("assistant", "no")], ())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_read_on_after_the_trainer_has_read(num_workers: int, parts: TinyParts, tmp_path: Path) -> None:
    """pyarrow has threads and maps, which a fork leaves behind."""
    table = pyarrow.table({"text": [f"Say {n}." for n in range(40)]})
    reader = SavedDatasetReader(save(tmp_path / "a", table, batch=7))
    reader.read(5)
    assert_decodes_in_any_order(reader, parts, num_workers)


def test_a_damaged_batch_sets_its_rows_aside_and_no_others(tmp_path: Path) -> None:
    table = pyarrow.table({"text": [f"document {n}" for n in range(4)]})
    folder = save(tmp_path / "a", table)
    content = (folder / "data.arrow").read_bytes()
    ends = struct.pack("<3i", 0, 10, 20)  # where the first batch's texts start and end
    assert content.count(ends) == 2
    damaged = content.replace(ends, struct.pack("<3i", 0, 1 << 30, 20), 1)
    (folder / "data.arrow").write_bytes(damaged)
    reader = SavedDatasetReader(folder)
    for number in (0, 1):
        with pytest.raises(BadRow, match=f"broken_record_batch: row {number}: at byte"):
            reader.read(number)
    assert said(reader.read(3)) == [("assistant", "document 3")]


def test_a_row_that_is_too_large_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_core.data.readers.saved_datasets.MAX_ROW_BYTES", 100)
    table = pyarrow.table({"text": ["a" * 200, "b"], "unused": [b"c" * 500] * 2})
    reader = SavedDatasetReader(save(tmp_path / "a", table))
    with pytest.raises(BadRow, match=r"row_too_large: row 0 has 20\d bytes"):
        reader.read(0)
    assert said(reader.read(1)) == [("assistant", "b")]


def test_whatever_is_damaged_is_named(tmp_path: Path) -> None:
    """Or is not seen, where a byte of a text became another; never does it crash."""
    folder = save(tmp_path / "a", pyarrow.Table.from_pylist([{"text": "a", "image": {"bytes": b"1", "path": "x"}}]))
    file = folder / "data.arrow"
    content, refused, aside = file.read_bytes(), 0, 0
    for position in range(0, len(content) - 8):
        file.write_bytes(content[:position] + bytes([content[position] ^ 11]) + content[position + 1 :])
        try:
            SavedDatasetReader(folder).read(0)
        except BadRow:
            aside += 1
        except DataError as error:
            refused += str(folder) in str(error)
    assert refused > 50
    assert aside > 5


@pytest.mark.parametrize("end", [8, 100])
def test_a_file_that_was_cut_short_is_refused(end: int, tmp_path: Path) -> None:
    """Without the mark of 8 bytes, pyarrow takes a stream that ends between two batches for a whole one."""
    folder = tmp_path / "a"
    shutil.copytree(GOLDEN / "5.2.0", folder)
    file = next((folder / "train").glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:-end])
    with pytest.raises(DataError, match=r"cut short|cannot be read as an Arrow stream"):
        SavedDatasetReader(folder)


def test_folders_that_are_no_data_set_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds neither dataset_dict\.json nor state\.json"):
        SavedDatasetReader(tmp_path)
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"state\.json cannot be read"):
        SavedDatasetReader(tmp_path)
    files = [{"filename": "data.arrow"}]
    for columns in (5, [["a"]]):
        (tmp_path / "state.json").write_text(json.dumps({"_data_files": files, "_format_columns": columns}))
        with pytest.raises(DataError, match=r"state.json has _format_columns .*, expected a list of names or null"):
            SavedDatasetReader(tmp_path)
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": ["a"]}]}')
    with pytest.raises(DataError, match="names no files of a data set"):
        SavedDatasetReader(tmp_path)
    (tmp_path / "state.json").write_text('{"_data_files": [3]}')
    with pytest.raises(DataError, match="names no files of a data set"):
        SavedDatasetReader(tmp_path)
    table = pyarrow.table({"text": ["a"]})
    for elsewhere in (str(save(tmp_path / "there", table) / "data.arrow"), "../there/data.arrow"):
        (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": elsewhere}]}))
        with pytest.raises(DataError, match="names files outside its folder"):
            SavedDatasetReader(tmp_path)
    with pytest.raises(DataError, match="a separate order of rows"):
        SavedDatasetReader(save(tmp_path / "old", table, _indices_data_files=[{"filename": "indices.arrow"}]))
    with pytest.raises(DataError, match=r"has the columns question; expected one of: conversations; messages"):
        SavedDatasetReader(save(tmp_path / "other", pyarrow.table({"question": ["a"]})))
    with pytest.raises(DataError, match="holds no rows"):
        SavedDatasetReader(save(tmp_path / "empty", table.slice(0, 0)))
    categories = pyarrow.table({"text": pyarrow.array(["a", "b", "a"]).dictionary_encode()})
    with pytest.raises(DataError, match="a column of categories"):
        SavedDatasetReader(save(tmp_path / "categories", categories))
    folder = save(tmp_path / "gone", table)
    (folder / "data.arrow").unlink()
    with pytest.raises(DataError, match=r"data\.arrow cannot be read"):
        SavedDatasetReader(folder)
    (folder / "data.arrow").write_bytes(b"")
    with pytest.raises(DataError, match=r"data\.arrow"):
        SavedDatasetReader(folder)


def test_a_file_that_changes_while_in_use_stops_the_run(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", pyarrow.table({"text": ["a"]}))
    reader = SavedDatasetReader(folder)
    with (folder / "data.arrow").open("ab") as file:
        file.write(b"more")
    with pytest.raises(DataError, match="changed while in use"):
        reader.read(0)


def test_without_pyarrow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"needs pyarrow to be read: pip install 'llava-core\[parquet\]'"):
        SavedDatasetReader(GOLDEN / "5.2.0")
