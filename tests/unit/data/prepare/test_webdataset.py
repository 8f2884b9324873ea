"""Shards: what webdataset's own writer would write, and samples that are those of the rows."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from llava_core.data.examples import ExampleBuilder
from llava_core.data.image_side import ImageSide
from llava_core.data.image_store import ImageStore
from llava_core.data.images import ImageProcessor
from llava_core.data.prepare.webdataset import WebdatasetTarget
from llava_core.data.readers import Reader, reader_name
from llava_core.data.readers.llava import LlavaJsonReader
from llava_core.data.readers.text import TextReader
from llava_core.data.readers.webdataset import WebdatasetReader
from llava_core.data.sources import Place, Source, Sources
from llava_core.data.templates import BUILTIN_TEMPLATES
from llava_core.errors import DataError
from llava_core.testing.datasets import TinyParts
from llava_core.weights.tokenizer import load_tokenizer
from tests.unit.data.prepare.support import Quiet, listed, preparation, write_lines

TURNS = [{"from": "human", "value": "<image>\nWas ist das?"}, {"from": "gpt", "value": "Größe 5, 红色."}]


def picture(kind: str, colour: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (colour, 9, 9)).save(file, kind)
    return file.getvalue()


def prepared(folder: Path, rows: list[dict[str, object]]) -> Path:
    """The folder of the shards, of two rows each; images are in the folder `images`."""
    (folder / "rows.json").write_text(json.dumps(rows))
    store = ImageStore(folder / "images", 10**6)
    path = folder / "rows.json"
    preparation("webdataset", path, LlavaJsonReader(path), WebdatasetTarget("rows", store), folder / "out").run(Quiet())
    return folder / "out"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, kind in enumerate(("JPEG", "PNG", "WEBP", "GIF", "BMP")):
        (folder / f"{number}.jpg").write_bytes(picture(kind, 40 * number))
    return folder


def test_shards_are_those_of_webdatasets_own_writer(parts: TinyParts, tmp_path: Path) -> None:
    """Made without a time, user or group; its members are in the order of their suffixes, which png is not."""
    webdataset = pytest.importorskip("webdataset")
    images = tmp_path / "images"
    images.mkdir()
    rows = [{"id": f"GCC_train_00{n}", "image": f"{n}.jpg", "conversations": TURNS} for n in range(7)]
    for n in range(7):
        (images / f"{n}.jpg").write_bytes(picture("JPEG", n))
    out = prepared(tmp_path, rows)
    for number, start in enumerate((0, 5)):
        file = io.BytesIO()
        with webdataset.TarWriter(file, user="", group="", mtime=0, encoder=False) as writer:
            for row in rows[start : start + 5]:
                jpg = (images / str(row["image"])).read_bytes()
                writer.write({"__key__": row["id"], "jpg": jpg, "json": json.dumps(TURNS).encode()})
        assert (out / f"rows-{number:05d}.tar").read_bytes() == file.getvalue()


def test_samples_are_token_for_token_those_of_the_rows(parts: TinyParts, tmp_path: Path) -> None:
    data = write_lines(parts, tmp_path / "data.jsonl", bad=False)
    data.webdataset(tmp_path / "out").run(Quiet())
    assert reader_name(tmp_path / "out") == "webdataset"
    live, shards = data.webdataset(tmp_path / "out").reader, WebdatasetReader(tmp_path / "out")
    assert len(live) == len(shards) == 36
    for index in range(36):
        (one,), (other,) = (_build(parts, reader, index) for reader in (live, shards))
        assert (one.id, one.tokens.tolist(), one.supervised.tolist()) == (
            other.id,
            other.tokens.tolist(),
            other.supervised.tolist(),
        )
        assert (one.pixels is None) == (other.pixels is None)
        assert one.pixels is None or other.pixels is None or one.pixels.equal(other.pixels)


def _build(parts: TinyParts, reader: Reader, index: int):  # type: ignore[no-untyped-def]
    builder = ExampleBuilder(
        sources=Sources([Source(reader, BUILTIN_TEMPLATES["v1"], ImageStore(parts.images, 10**6))]),
        tokenizer=load_tokenizer(parts.language),
        images=ImageSide(ImageProcessor.from_folder(parts.vision, "pad"), tile_tokens=9),
        pad_id=0,
        vocab_size=320,
        max_length=256,
        overlong=None,
    )
    return builder.build(Place(0, index), reader.read(index)).examples


def test_webdataset_itself_reads_them(images: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    rows = [{"id": str(n), "image": f"{n}.jpg", "conversations": TURNS} for n in range(5)]
    out = prepared(tmp_path, [*rows, {"id": "text", "conversations": TURNS[1:]}])
    found = list(webdataset.WebDataset([str(path) for path in sorted(out.glob("*.tar"))], shardshuffle=False))
    assert [sample["__key__"] for sample in found] == ["0", "1", "2", "3", "4", "text"]
    suffixes = ["jpg", "png", "webp", "gif", "bmp"]
    for number, suffix in enumerate(suffixes):  # by what they are, not by what they are called
        assert found[number][suffix] == (images / f"{number}.jpg").read_bytes()
    assert [json.loads(sample["json"]) for sample in found] == [TURNS] * 5 + [TURNS[1:]]


def test_several_images_stay_in_order(images: Path, tmp_path: Path) -> None:
    names = [f"{n % 5}.jpg" for n in range(12)]
    out = prepared(tmp_path, [{"id": "many", "image": names, "conversations": TURNS}])
    with tarfile.open(out / "rows-00000.tar") as tar:
        members = tar.getnames()
    assert members == sorted(members)
    assert members[:2] == ["many.000.jpg", "many.001.png"]
    record = WebdatasetReader(out).read(0)
    assert [image.data for image in record.images] == [(images / name).read_bytes() for name in names]  # type: ignore[union-attr]


def test_ids_become_keys_that_are_apart(images: Path, tmp_path: Path) -> None:
    ids = ["a", "a", "b.c/d", "b_c_d", "", "größe-1", "a-1", None, "x" * 300]
    rows = [{"id": name, "image": "0.jpg", "conversations": TURNS} for name in ids]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    made = preparation(
        "webdataset", path, LlavaJsonReader(path), WebdatasetTarget("rows", ImageStore(images, 10**6)), tmp_path / "out"
    )
    replace(made, part_size=9).run(Quiet())
    reader = WebdatasetReader(tmp_path / "out")
    found = [reader.read(index).id for index in range(len(reader))]
    assert found == ["a", "a-1", "b_c_d", "b_c_d-3", "row", "größe-1", "a-1-6", "row-7", "x" * 300]


def test_rows_whose_images_training_could_not_use_are_left_out(images: Path, tmp_path: Path) -> None:
    (images / "half.jpg").write_bytes(picture("PNG")[:40])
    (images / "words.jpg").write_text("no picture")
    Image.new("L", (2000, 501)).save(images / "large.png")
    named = ["0.jpg", "gone.jpg", "half.jpg", "words.jpg", "large.png", "../rows.json", "1.jpg"]
    out = prepared(tmp_path, [{"id": name, "image": name, "conversations": TURNS} for name in named])
    reasons = ["missing_image", "broken_image", "broken_image", "image_too_large", "image_outside_folder"]
    assert listed(out) == list(enumerate(reasons, start=1))
    reader = WebdatasetReader(out)
    assert [reader.read(index).id for index in range(len(reader))] == ["0_jpg", "1_jpg"]


def test_images_that_rows_bring_along_are_copied(images: Path, tmp_path: Path) -> None:
    first = prepared(tmp_path, [{"id": str(n), "image": f"{n}.jpg", "conversations": TURNS} for n in range(5)])
    target = WebdatasetTarget("rows", ImageStore(None, 10**6))
    preparation("webdataset", first, WebdatasetReader(first), target, tmp_path / "again").run(Quiet())
    assert (first / "rows-00000.tar").read_bytes() == (tmp_path / "again/rows-00000.tar").read_bytes()


def test_documents_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a document\n")
    target = WebdatasetTarget("a", ImageStore(None, 1))
    with pytest.raises(DataError, match="hold conversations, and this data set holds texts"):
        preparation("webdataset", path, TextReader(path), target, tmp_path / "out").run(Quiet())
