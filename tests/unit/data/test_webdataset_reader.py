"""webdataset shards and energon's descriptions: what webdataset's own writer wrote, read as webdataset reads it."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_core.data.image_store import ImageStore
from llava_core.data.readers import reader_name
from llava_core.data.readers.energon import EnergonReader, expand_braces
from llava_core.data.readers.tar_samples import TarSamples
from llava_core.data.readers.webdataset import WebdatasetReader
from llava_core.data.records import EmbeddedImage, Record
from llava_core.errors import BadRow, DataError

GOLDEN = Path(__file__).parents[2] / "golden" / "energon"
LONG_KEY = "deep/" * 30 + "sample"  # a name of more than 100 characters takes a header of its own


def picture(colour: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (colour, 0, 0)).save(file, "PNG")
    return file.getvalue()


def turns(number: int) -> list[dict[str, str]]:
    return [{"from": "human", "value": f"<image>\nWhat is {number}?"}, {"from": "gpt", "value": f"It is {number}."}]


def sample(number: int) -> dict[str, Any]:
    """As Pai-Megatron-Patch's convert_llava_pretrain_to_wds.py writes one."""
    key = LONG_KEY if number == 3 else f"{number // 3:02}/img{number}"
    return {"__key__": key, "png": picture(number), "json": json.dumps(turns(number)).encode()}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven samples in three shards, by webdataset's own writer."""
    webdataset = pytest.importorskip("webdataset")
    folder = tmp_path_factory.mktemp("shards")
    with webdataset.ShardWriter(str(folder / "pretrain-%d.tar"), maxcount=3, verbose=0) as writer:
        for number in range(7):
            writer.write(sample(number))
    return folder


def said(row: Record) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in row.turns]


def tar_of(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def one_shard(tmp_path: Path, members: dict[str, bytes]) -> WebdatasetReader:
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    return WebdatasetReader(tmp_path / "a.tar")


def test_samples_are_those_that_webdataset_itself_reads(shards: Path) -> None:
    import webdataset

    files = sorted(str(path) for path in shards.iterdir())
    theirs = list(webdataset.WebDataset(files, shardshuffle=False))
    ours = TarSamples([Path(file) for file in files], files, None)
    assert len(ours) == len(theirs) == 7
    assert ours.counts() == [3, 3, 1]
    for index in (6, 2, 0, 5, 1, 4, 3):  # from anywhere
        expected = {key: value for key, value in theirs[index].items() if not key.startswith("__")}
        assert (ours.read(index).key, dict(ours.read(index).members)) == (theirs[index]["__key__"], expected)


def test_a_sample_is_a_conversation_with_its_picture(shards: Path) -> None:
    reader = WebdatasetReader(shards)
    for again in (reader, pickle.loads(pickle.dumps(reader))):
        for number in range(7):
            row = again.read(number)
            assert said(row) == [("human", f"<image>\nWhat is {number}?"), ("assistant", f"It is {number}.")]
            (image,) = row.images
            assert isinstance(image, EmbeddedImage)
            assert ImageStore(None, 100).open(image).getpixel((0, 0)) == (number, 0, 0)
    assert reader.read(3).id == LONG_KEY
    assert (reader.fingerprint["num_rows"], reader.fingerprint["num_files"]) == (7, 3)
    assert reader_name(shards / "pretrain-0.tar") == "webdataset"


def test_a_kept_index_reads_the_same(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_core.data.readers.tar_samples.KEPT_FROM_BYTES", 1)
    first = [WebdatasetReader(shards, index_folder=tmp_path).read(number) for number in range(7)]
    assert len(list(tmp_path.glob("*.npy"))) == 1
    monkeypatch.setattr("llava_core.data.readers.tar_samples._index_shards", None)  # not made a second time
    assert [WebdatasetReader(shards, index_folder=tmp_path).read(number) for number in range(7)] == first


def test_rows_captions_and_other_members(tmp_path: Path) -> None:
    row = json.dumps({"id": "x", "image": "elsewhere.jpg", "conversations": turns(1)}).encode()
    reader = one_shard(
        tmp_path,
        {
            "README": b"no sample",
            "a.JSON": row,
            "a.left.jpg": b"1",
            "a.right.jpg": b"2",
            "__meta__/x.txt": b"webdataset's own",
            "b.png": b"3",
            "b.txt": "ein Hund, größer".encode(),
            "b.json": b'{"caption": "not this", "width": 3}',
            "c.txt": b"text alone, of a picture that is gone",
        },
    )
    assert len(reader) == 3
    assert said(reader.read(0)) == [("human", "<image>\nWhat is 1?"), ("assistant", "It is 1.")]
    assert [image.data for image in reader.read(0).images if isinstance(image, EmbeddedImage)] == [b"1", b"2"]
    assert said(reader.read(1)) == [("human", "<image>"), ("assistant", "ein Hund, größer")]
    assert reader.read(2).images == ()


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"a.jpg": b"1"}, r"malformed_row: row 0: a is str '.jpg', expected a .json with a conversation"),
        ({"a.json": b"{", "a.jpg": b"1"}, "malformed_json: row 0: a.json"),
        ({"a.json": b"\xff", "a.jpg": b"1"}, "malformed_json"),
        ({"a.json": b"[]", "a.jpg": b"1"}, "malformed_row: row 0: json is list"),
        ({"a.txt": b"\xff\xfe", "a.jpg": b"1"}, "not_utf8: row 0: a.txt"),
        ({"a.jpg": b"1", "a.JPG": b"2", "a.txt": b"b"}, "malformed_row: row 0 .*a has two members .jpg"),
    ],
)
def test_a_sample_that_cannot_be_used_is_set_aside(tmp_path: Path, members: dict[str, bytes], reason: str) -> None:
    reader = one_shard(tmp_path, members | {"z.txt": b"good"})
    with pytest.raises(BadRow, match=reason):
        reader.read(0)
    assert reader.read(1).id == "z"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda data: b"", "is empty"),
        (lambda data: data[:700], "unexpected end of data"),
        (lambda data: data[:1024], "lacks the end mark of a tar file: it was cut short"),
        (lambda data: data[:2048], "lacks the end mark"),
        (lambda data: data[:1024] + b"garbage" * 200, "lacks the end mark|cannot be read as a tar file"),
        (lambda data: b"garbage" * 200, "cannot be read as a tar file"),
        (lambda data: b"\x1f\x8b\x08" + data, "unpack it if it is compressed"),
        (lambda data: data + data, "goes on after its end mark"),
        (lambda data: bytes(10240), "holds no samples"),
    ],
)
def test_a_damaged_shard_is_refused(tmp_path: Path, change: Callable[[bytes], bytes], expected: str) -> None:
    (tmp_path / "a.tar").write_bytes(change(tar_of({"a.txt": b"one", "a.png": b"two"})))
    with pytest.raises(DataError, match=expected):
        WebdatasetReader(tmp_path / "a.tar")


def test_a_folder_without_shards_and_a_shard_that_changes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no .tar file"):
        WebdatasetReader(tmp_path)
    reader = one_shard(tmp_path, {"a.txt": b"one"})
    (tmp_path / "a.tar").write_bytes(tar_of({"a.txt": b"x" * 20_000}))
    with pytest.raises(DataError, match="changed while in use"):
        reader.read(0)


# --- energon

VQA: dict[str, Any] = {
    "sample_type": {"__module__": "megatron.energon", "__class__": "VQASample"},
    "field_map": {"image": "png", "context": "json[0][value]", "answers": "json[1][value]"},
}


def describe(folder: Path, dataset: dict[str, Any], **others: Any) -> Path:
    """What `energon prepare` leaves beside the shards."""
    meta = folder / ".nv-meta"
    meta.mkdir(exist_ok=True)
    counts = {f"pretrain-{i}.tar": count for i, count in enumerate((3, 3, 1))}
    split = {"exclude": [], "split_parts": {"train": ["pretrain-{0..1}.tar"], "val": ["pretrain-2.tar"], "test": []}}
    # JSON is YAML.
    (meta / "dataset.yaml").write_text(json.dumps(dataset))
    (meta / "split.yaml").write_text(json.dumps(split | others.get("split", {})))
    (meta / ".info.json").write_text(json.dumps({"shard_counts": counts | others.get("counts", {})}))
    return folder


@pytest.fixture
def prepared(shards: Path, tmp_path: Path) -> Path:
    for shard in shards.iterdir():
        (tmp_path / shard.name).symlink_to(shard)
    return describe(tmp_path, VQA)


@pytest.mark.parametrize("split", ["train", "val"])
def test_what_energon_prepared_is_read_as_energon_reads_it(split: str) -> None:
    expected = json.loads((GOLDEN / "expected.json").read_text())[split]
    reader = EnergonReader(GOLDEN, split=split)
    rows = [reader.read(i) for i in range(len(reader))]
    colours = [ImageStore(None, 100).open(row.images[0]).getpixel((0, 0))[0] for row in rows]
    assert [[row.id, *(text for _, text in said(row)), c] for row, c in zip(rows, colours, strict=True)] == expected


@pytest.mark.parametrize("older", [False, True])
def test_the_guides_field_map_gives_question_answer_and_picture(prepared: Path, older: bool) -> None:
    if older:
        describe(prepared, VQA | {"sample_type": None, "__module__": "megatron.energon", "__class__": "VQAWebdataset"})
        kept = json.loads((prepared / ".nv-meta/dataset.yaml").read_text())
        del kept["sample_type"]
        (prepared / ".nv-meta/dataset.yaml").write_text(json.dumps(kept))
        (prepared / ".nv-meta/.info.json").rename(prepared / ".nv-meta/.info.yaml")
    reader = EnergonReader(prepared)
    assert reader_name(prepared) == "energon"
    assert len(reader) == 6
    for number in range(6):
        row = reader.read(number)
        assert said(row) == [("human", f"<image>\nWhat is {number}?"), ("assistant", f"It is {number}.")]
        assert [ImageStore(None, 100).open(image).getpixel((0, 0)) for image in row.images] == [(number, 0, 0)]
    assert [EnergonReader(prepared, split="val").read(0).id] == ["02/img6"]
    assert EnergonReader(prepared).fingerprint != EnergonReader(prepared, split="val").fingerprint


def test_excluded_shards_and_samples_are_left_out(prepared: Path) -> None:
    describe(prepared, VQA, split={"exclude": ["pretrain-0.tar/00/img{0,2}"]})
    reader = EnergonReader(prepared)
    assert [reader.read(i).id for i in range(len(reader))] == ["00/img1", LONG_KEY, "01/img4", "01/img5"]
    describe(prepared, VQA, split={"exclude": ["pretrain-1.tar"]})
    assert [EnergonReader(prepared).read(i).id for i in range(3)] == ["00/img0", "00/img1", "00/img2"]


def energon_sample(tmp_path: Path, dataset: dict[str, Any], members: dict[str, bytes]) -> Record:
    (tmp_path / "pretrain-0.tar").write_bytes(tar_of(members))
    split = {"split_parts": {"train": ["pretrain-0.tar"]}}
    return EnergonReader(describe(tmp_path, dataset, split=split, counts={"pretrain-0.tar": 1})).read(0)


def test_captions_choices_and_crude_samples(tmp_path: Path) -> None:
    captions = {"sample_type": {"__class__": "CaptioningSample"}, "field_map": {"image": "jpg,png", "caption": "txt"}}
    row = energon_sample(tmp_path, captions, {"a.png": b"1", "a.txt": b"a dog"})
    assert said(row) == [("human", "<image>"), ("assistant", "a dog")]
    weighted = {
        **VQA,
        "field_map": {"image": "png", "context": "q.txt", "answers": "json[a]", "answer_weights": "json[w]"},
    }
    answers = json.dumps({"a": ["one", "two", "three"], "w": [0.2, 0.5, 0.5]}).encode()
    row = energon_sample(tmp_path, weighted, {"a.png": b"1", "a.q.txt": b"Which?", "a.json": answers})
    assert said(row) == [("human", "<image>\nWhich?"), ("assistant", "two")]
    crude = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    row = energon_sample(tmp_path, crude, {"a.png": b"1", "a.json": json.dumps(turns(4)).encode()})
    assert (said(row)[1], len(row.images)) == (("assistant", "It is 4."), 1)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"a.json": json.dumps(turns(0)).encode()}, "expected an image .png"),
        ({"a.png": b"1"}, "expected a member .json for context"),
        ({"a.png": b"1", "a.json": b"[]"}, r"expected something at \[0\], for context"),
        ({"a.png": b"1", "a.json": b'[{"value": "q"}, {"value": []}]'}, "answers is list"),
        ({"a.png": b"1", "a.json": b'[{"value": 3}, {"value": "a"}]'}, "context is int 3"),
        ({"a.png": b"1", "a.json": b'[{"value": "q"}, {"value": [5]}]'}, r"answers\[0\] is int 5"),
    ],
)
def test_a_sample_without_its_fields_is_set_aside(tmp_path: Path, members: dict[str, bytes], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        energon_sample(tmp_path, VQA, members)


@pytest.mark.parametrize(
    ("dataset", "others", "expected"),
    [
        (
            {"sample_type": {"__class__": "OCRSample"}},
            {},
            "is of OCRSample; VQA, Captioning, Crude samples can be read",
        ),
        ({}, {}, "is of None"),
        (VQA | {"sample_loader": "sample_loader.py:sample_loader"}, {}, "has a sample_loader, which is code"),
        (VQA | {"field_map": {"image": "png"}}, {}, "maps the fields image; VQA needs answers, context, image and may"),
        (
            VQA | {"field_map": {**VQA["field_map"], "colour": "txt"}},
            {},
            "maps the fields image, context, answers, colour",
        ),
        (VQA | {"field_map": {**VQA["field_map"], "image": "json"}}, {}, "names no image"),
        (VQA | {"field_map": {**VQA["field_map"], "context": "json[0"}}, {}, "is neither a suffix nor like"),
        (
            VQA,
            {"split": {"split_parts": {"validation": ["pretrain-0.tar"]}}},
            "has no split 'train'; there are: validation",
        ),
        (VQA, {"split": {"split_parts": {"train": []}}}, "the split 'train' of .* has no shards"),
        (VQA, {"split": {"split_parts": {"train": ["gone.tar"]}}}, "gone.tar cannot be read"),
        (VQA, {"counts": {"pretrain-1.tar": 4}}, "has 3 samples that are not excluded, and 4 when it was prepared"),
        (VQA, {"counts": {"pretrain-1.tar": None}}, "and None when it was prepared"),
        (VQA, {"counts": {"pretrain-1.tar": "3"}}, "and 3 when it was prepared"),
    ],
)
def test_a_description_that_cannot_be_honoured_is_refused(
    prepared: Path, dataset: dict[str, Any], others: dict[str, Any], expected: str
) -> None:
    describe(prepared, dataset, **others)
    with pytest.raises(DataError, match=expected):
        EnergonReader(prepared)


@pytest.mark.parametrize("name", ["a", "a{1,2}", "a{08..11}.tar", "{x,y}{1..3}", "a{3..1}b", "shards/{a,b{1,2}}"])
def test_braces_are_expanded_as_by_the_package_that_energon_uses(name: str) -> None:
    braceexpand = pytest.importorskip("braceexpand")
    assert expand_braces(name) == list(braceexpand.braceexpand(name))


def test_a_shard_that_changes_in_place_stops_the_run(shards: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    content = (shards / "pretrain-0.tar").read_bytes()
    for other in (b"x" * len(content), bytes(len(content))):
        path.write_bytes(content)
        reader = WebdatasetReader(path)
        path.write_bytes(other)
        with pytest.raises(DataError, match="changed while in use: row 1 is no sample any more"):
            reader.read(1)
