"""Damaged data through a run's own loader, one format after the other: it is refused by name, or rows of it are set
aside; what is trained on is what was written."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_core.config import RunConfig
from llava_core.data.examples import Built, Rejected, decoded
from llava_core.data.loader import StepLoader
from llava_core.data.quarantine import Quarantine
from llava_core.engine.processes import Processes
from llava_core.errors import ConfigError, DataError
from llava_core.plugins import Registry
from llava_core.preflight.subject import Subject
from llava_core.testing.datasets import TinyParts
from llava_core.train.data import open_readers
from tests.unit.data.prepare.support import Data as Preparable
from tests.unit.data.prepare.support import Quiet
from tests.unit.preflight.conftest import settings

GOLDEN = Path(__file__).parents[2] / "golden"
NUM_ROWS = 6
Sample = tuple[str, tuple[int, ...], float]


def picture(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (level, 0, 0)).save(file, "PNG")
    return file.getvalue()


def turns(number: int) -> list[dict[str, str]]:
    return [{"from": "human", "value": f"<image>\nWhat is {number}?"}, {"from": "gpt", "value": f"It is {number}."}]


def llava_row(number: int) -> dict[str, Any]:
    return {"id": str(number), "image": f"{number}.png", "conversations": turns(number)}


def write_list(path: Path) -> None:
    path.write_text(json.dumps([llava_row(number) for number in range(NUM_ROWS)]))


def write_lines(path: Path) -> None:
    path.write_text("".join(json.dumps(llava_row(number)) + "\n" for number in range(NUM_ROWS)))


def write_texts(path: Path) -> None:
    path.write_text("".join(f"It is {number}.\n" for number in range(NUM_ROWS)))


def write_tar(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for number in range(NUM_ROWS):
            for suffix, data in (("png", picture(number)), ("json", json.dumps(turns(number)).encode())):
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def write_parquet(path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [llava_row(n) | {"image": {"bytes": picture(n), "path": None}} for n in range(NUM_ROWS)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)


def write_megatron(path: Path) -> None:
    for suffix in (".bin", ".idx"):
        shutil.copy(GOLDEN / "megatron" / f"documents{suffix}", path.with_suffix(suffix))


def write_energon(path: Path) -> None:
    shutil.copytree(GOLDEN / "energon", path)


def write_saved(path: Path) -> None:
    pytest.importorskip("pyarrow")
    shutil.copytree(GOLDEN / "datasets/5.2.0/train", path)


FORMATS: dict[str, Callable[[Path], None]] = {
    "rows.json": write_list,
    "rows.jsonl": write_lines,
    "rows.txt": write_texts,
    "rows.tar": write_tar,
    "rows.parquet": write_parquet,
    "rows.idx": write_megatron,
    "energon": write_energon,
    "saved": write_saved,
}
TOKENS = "tokens"
FILES = {
    "energon": "pretrain-0.tar",
    "saved": "data-00000-of-00002.arrow",
    TOKENS: "tokens-00000.safetensors",
}
"""Of a format that is a folder the file with its first rows."""


@dataclass(frozen=True)
class Data:
    """A data set that may be damaged.

    Attributes:
        path: what a config names.
        file: where rows are in it.
    """

    path: Path
    file: Path
    parts: TinyParts

    @property
    def config(self) -> RunConfig:
        data = {"path": str(self.path), "images": str(self.path.parent / "images"), "max_bad_fraction": 1.0}
        return settings(self.parts, self.path.parent / "run", data=data)

    def read(self) -> tuple[list[Sample], list[Rejected]]:
        """What a run would train on, and what it would set aside."""
        loader = Subject.of(self.config, Registry.discover(), 1).loader
        samples, rejected = [], []
        for result in decoded(loader.builder, np.arange(loader.num_rows), 0):
            if isinstance(result, Built):
                for example in result.examples:
                    pixels = 0.0 if example.pixels is None else float(example.pixels.double().sum())
                    samples.append((example.id, tuple(example.tokens.tolist()), pixels))
            else:
                rejected.append(result)
        return samples, rejected


@pytest.fixture(params=[*FORMATS, TOKENS])
def data(request: pytest.FixtureRequest, parts: TinyParts, tmp_path: Path) -> Data:
    (tmp_path / "images").mkdir()
    for number in range(NUM_ROWS):
        (tmp_path / "images" / f"{number}.png").write_bytes(picture(number))
    path = tmp_path / request.param
    if request.param == TOKENS:
        write_lines(tmp_path / "source.jsonl")
        Preparable(parts, tmp_path / "source.jsonl").tokens(path, part_size=NUM_ROWS).run(Quiet())
    else:
        FORMATS[request.param](path)
    return Data(path, path / FILES[request.param] if request.param in FILES else path, parts)


def test_a_file_of_no_bytes_is_named(data: Data) -> None:
    data.file.write_bytes(b"")
    with pytest.raises((DataError, ConfigError), match=data.file.name):
        data.read()


def test_a_folder_in_a_files_place_is_named(data: Data) -> None:
    data.file.unlink()
    data.file.mkdir()
    with pytest.raises((DataError, ConfigError), match=data.file.name):
        data.read()


def test_a_file_that_may_not_be_read_is_named(data: Data) -> None:
    config, registry = data.config, Registry.discover()

    def read_first() -> None:
        (reader,) = open_readers(config, registry, Processes())
        reader.read(0)  # where files are opened only then

    read_first()  # what is imported for it is closed to another user, too
    data.file.chmod(0)
    with unprivileged(data.path.parent), pytest.raises(DataError, match=rf"{data.file.name}.*[Pp]ermission denied"):
        read_first()


@contextmanager
def unprivileged(folder: Path) -> Iterator[None]:
    """As a user for whom permissions count; root, to whom all is open, becomes another one."""
    if os.geteuid():
        yield
        return
    above = [parent for parent in (folder, *folder.parents) if parent.stat().st_mode & 0o001 == 0]
    modes = {parent: parent.stat().st_mode for parent in above}
    for parent in above:
        parent.chmod(modes[parent] | 0o011)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        for parent, mode in modes.items():
            parent.chmod(mode)


def test_nothing_that_was_not_written_is_trained_on_of_a_file_cut_short(data: Data) -> None:
    """At whatever byte. Of one row a line, a cut at a line's end cannot be told; of plain text none, and the last line
    is then shorter."""
    written, before = data.read()
    content, refusals = data.file.read_bytes(), []
    for end in sorted(random.Random(0).sample(range(len(content)), 12)):
        data.file.write_bytes(content[:end])
        try:
            samples, rejected = data.read()
        except (DataError, ConfigError) as error:
            refusals.append(str(error))
            continue
        if data.path.suffix == ".txt":
            assert samples[:-1] == written[: len(samples) - 1], end
            continue
        assert set(samples) <= set(written), end
        at_line_end = data.path.suffix == ".jsonl" and content[end - 1 : end + 1] in (b"}\n", b"\n{")
        assert len(rejected) > len(before) or at_line_end or samples == written, end
    assert all(str(data.path.parent) in refusal for refusal in refusals), refusals


def test_damage_anywhere_ends_in_nothing_but_a_named_error(data: Data) -> None:
    """Not all of it can be found without a checksum, but none may end a run without a word of what it is."""
    written, _ = data.read()
    content, refusals = data.file.read_bytes(), []
    rng = random.Random(0)
    for damage in (b"\x00" * 8, b"\xff" * 8, None) * 5:
        start = rng.randrange(len(content))
        changed = bytearray(content)
        if damage is None:
            changed[start] ^= 1 << rng.randrange(8)
        else:
            changed[start : start + 8] = damage[: len(content) - start]
        data.file.write_bytes(changed)
        try:
            samples, _ = data.read()
            assert data.path.name != TOKENS or samples == written  # what was prepared has checksums
        except (DataError, ConfigError) as error:
            refusals.append(str(error))
    assert all(str(data.path.parent) in refusal for refusal in refusals), refusals


NOT_UTF8 = b"It is \xff\xfe."


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.txt", "rows.tar", "rows.parquet"])
def test_a_row_that_is_not_utf8_is_set_aside_alone(name: str, parts: TinyParts, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(NUM_ROWS):
        (tmp_path / "images" / f"{number}.png").write_bytes(picture(number))
    path = tmp_path / name
    FORMATS[name](path)
    written, _ = Data(path, path, parts).read()
    if path.suffix == ".parquet":  # compressed: the bytes are changed in what is written
        write_raw_parquet(path)
    else:
        content = path.read_bytes()
        assert content.count(b"It is 3.") == 1
        path.write_bytes(content.replace(b"It is 3.", NOT_UTF8[:8]))
    samples, rejected = Data(path, path, parts).read()
    assert [(bad.index, bad.reason in ("not_utf8", "malformed_json")) for bad in rejected] == [(3, True)]
    assert samples == written[:3] + written[4:]


def write_raw_parquet(path: Path) -> None:
    """`write_parquet`'s rows, one answer of which is no text: an Arrow string is not checked when it is made."""
    import pyarrow
    from pyarrow import parquet

    table = parquet.read_table(path)
    rows = table.to_pylist()
    rows[3]["conversations"][1]["value"] = "It is \x7f\x7f"
    table = pyarrow.Table.from_pylist(rows, schema=table.schema)
    parquet.write_table(table, path, row_group_size=2, compression="none", use_dictionary=False, write_statistics=False)
    content = path.read_bytes()
    assert content.count(b"It is \x7f\x7f") == 1
    path.write_bytes(content.replace(b"It is \x7f\x7f", NOT_UTF8[:8]))


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".parquet", ".tar"])
def test_a_row_of_50_megabytes_is_set_aside_alone(suffix: str, parts: TinyParts, tmp_path: Path) -> None:
    """Before it is tokenised, for which there would be too little memory."""
    texts = ["It is 0.", "blue " * 10_000_000, "It is 2."]
    path = tmp_path / f"rows{suffix}"
    rows = [{"id": f"row-{n}", "text": text} for n, text in enumerate(texts)]
    if suffix == ".txt":
        path.write_text("\n".join(texts))
    elif suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with tarfile.open(path, "w") as tar:
            for number, text in enumerate(texts):
                member = tarfile.TarInfo(f"row-{number}.json")
                talk = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": text}]
                content = json.dumps(talk).encode()
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    reader = {"data": {"path": str(path), "reader": "text_json" if suffix == ".jsonl" else None, "images": None}}
    loader = Subject.of(settings(parts, tmp_path / "run", **reader), Registry.discover(), 1).loader
    results = list(decoded(loader.builder, np.arange(3), 0))
    assert [isinstance(result, Built) for result in results] == [True, False, True]
    assert isinstance(results[1], Rejected)
    assert (results[1].reason, results[1].index) == ("row_too_large", 1)


def test_rows_with_one_id_are_all_trained_on_and_all_listed(parts: TinyParts, tmp_path: Path) -> None:
    """An id is a name for messages: a row is known by its source and its number."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images/0.png").write_bytes(picture(0))
    rows = [llava_row(number) | {"id": "same", "image": f"{number % 2}.png"} for number in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = {"path": str(tmp_path / "rows.json"), "images": str(tmp_path / "images"), "max_bad_fraction": 1.0}
    found = Subject.of(settings(parts, tmp_path / "run", data=data), Registry.discover(), 1).loader
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", 1.0)
    loader = StepLoader(found.builder, found.order, found.num_rows, found.batching, quarantine, 0)
    step = next(iter(loader))
    assert [id for batch in step.batches for id in batch.ids] == ["same", "same"]
    listed = [json.loads(line) for line in quarantine.path.read_text().splitlines()]
    assert sorted((line["index"], line["id"], line["reason"]) for line in listed) == [
        (1, "same", "missing_image"),
        (3, "same", "missing_image"),
    ]
