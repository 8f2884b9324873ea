"""Megatron's .bin and .idx: files that megatron-core wrote, read to the last token; damaged ones, refused."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_core.data.examples import ExampleBuilder
from llava_core.data.packing import build_batch
from llava_core.data.readers import open_reader, reader_name
from llava_core.data.readers.megatron import MegatronReader, MegatronSftReader
from llava_core.data.records import modality_length
from llava_core.data.sources import Place, Source, Sources
from llava_core.errors import BadRow, DataError

GOLDEN = Path(__file__).parents[2] / "golden" / "megatron"
EXPECTED: dict[str, list[Any]] = json.loads((GOLDEN / "expected.json").read_text())
HEADER_BYTES = 34


def flat(document: list[Any]) -> list[int]:
    return [token for part in document for token in (part if isinstance(part, list) else [part])]


def copied(tmp_path: Path, name: str) -> Path:
    """The prefix of a copy that may be damaged."""
    for suffix in (".bin", ".idx"):
        shutil.copy(GOLDEN / (name + suffix), tmp_path)
    return tmp_path / name


@pytest.mark.parametrize("name", ["documents", "sentences", "wide"])
@pytest.mark.parametrize("suffix", ["", ".idx", ".bin"])
def test_documents_are_read_to_the_last_token(name: str, suffix: str) -> None:
    path = GOLDEN / (name + suffix)
    assert reader_name(path) == "megatron"
    reader = open_reader(path, None, {"megatron": MegatronReader}, index_folder=None)
    for again in (reader, pickle.loads(pickle.dumps(reader))):
        rows = [again.read(i) for i in range(len(again))]
        assert [row.sequences[0].tokens.tolist() for row in rows] == [flat(document) for document in EXPECTED[name]]
        assert all(row.sequences[0].supervised.all() for row in rows)
        assert [modality_length(row) for row in rows] == [-len(flat(document)) for document in EXPECTED[name]]
    size = (GOLDEN / f"{name}.bin").stat().st_size
    assert (reader.fingerprint["num_bytes"], reader.fingerprint["num_rows"]) == (size, len(EXPECTED[name]))


def test_a_large_reader_is_pickled_by_its_path() -> None:
    assert len(pickle.dumps(MegatronReader(GOLDEN / "documents"))) < 1000


def test_packed_conversations_come_apart_with_their_answers_marked() -> None:
    reader = MegatronSftReader(GOLDEN / "packed")
    for index, samples in enumerate(EXPECTED["packed"]):
        found = reader.read(index).sequences
        assert [sequence.tokens.tolist() for sequence in found] == [[*q, *a] for q, a in samples]
        marked = [[False] * len(question) + [True] * len(answer) for question, answer in samples]
        assert [sequence.supervised.tolist() for sequence in found] == marked


def test_documents_are_no_packed_conversations() -> None:
    with pytest.raises(DataError, match=r"keeps ids as uint16.*choose the reader megatron"):
        MegatronSftReader(GOLDEN / "documents")
    with pytest.raises(BadRow, match=r"malformed_row: row 0 .*documents have the reader megatron"):
        MegatronSftReader(GOLDEN / "wide").read(0)


def builder(reader: MegatronReader, vocab_size: int = 64, max_length: int = 64) -> ExampleBuilder:
    return ExampleBuilder(
        sources=Sources([Source(reader, None)]),
        tokenizer=None,
        images=None,
        pad_id=0,
        vocab_size=vocab_size,
        max_length=max_length,
        overlong=None,
    )


def test_a_batch_learns_the_labels_that_were_written() -> None:
    """Against the files themselves: each label with the id that it stands beside."""
    reader = MegatronSftReader(GOLDEN / "packed")
    written = np.fromfile(GOLDEN / "packed.bin", dtype="<i4").reshape(len(reader), 2, -1)
    for index, (ids, labels) in enumerate(written.tolist()):
        examples = builder(reader).build(Place(0, index), reader.read(index)).examples
        batch = build_batch(examples, pad_id=0, image_size=1)
        learnt = list(zip(batch.tokens[batch.label_index].tolist(), batch.targets.tolist(), strict=True))
        beside = [(-1 - id if id < 0 else id, label) for id, label in zip(ids, labels, strict=True) if label != -100]
        assert learnt == beside
        ends = [position + 1 for position, id in enumerate(ids) if id < 0]
        assert batch.cu_seqlens.tolist() == [0, *ends], "one conversation does not see another"


def test_ids_beyond_the_models_vocabulary_are_set_aside() -> None:
    reader = MegatronReader(GOLDEN / "wide")
    with pytest.raises(BadRow, match="unknown_token: the row holds the token 128000.*embedding has 320 rows"):
        builder(reader, 320).build(Place(0, 0), reader.read(0))


def test_a_conversation_without_an_answer_leaves_the_others(tmp_path: Path) -> None:
    prefix = copied(tmp_path, "packed")
    content = np.fromfile(prefix.with_suffix(".bin"), dtype="<i4")
    content[16:21] = -100  # the labels of the first
    content.tofile(prefix.with_suffix(".bin"))
    reader = MegatronSftReader(prefix)
    (kept,) = builder(reader).build(Place(0, 0), reader.read(0)).examples
    assert kept.tokens.tolist() == flat(EXPECTED["packed"][0][1])


def test_conversations_are_truncated_and_documents_split() -> None:
    packed, documents = MegatronSftReader(GOLDEN / "packed"), MegatronReader(GOLDEN / "documents")
    wholes = [flat(sample) for sample in EXPECTED["packed"][0]]
    cut = builder(packed, max_length=5).build(Place(0, 0), packed.read(0)).examples
    assert [example.tokens.tolist() for example in cut] == [whole[:5] for whole in wholes]
    pieces = builder(documents, 320, max_length=5).build(Place(0, 2), documents.read(2)).examples
    assert sum(example.length - 1 for example in pieces) == len(flat(EXPECTED["documents"][2])) - 1


def test_an_answer_that_is_cut_off_leaves_the_others_of_its_row() -> None:
    reader = MegatronSftReader(GOLDEN / "packed")
    samples = EXPECTED["packed"][0]
    longest = max(len(question) for question, _ in samples)
    kept = [[*q, *a][:longest] for q, a in samples if len(q) < longest]
    assert 0 < len(kept) < len(samples)
    row = reader.read(0)
    examples = builder(reader, max_length=longest).build(Place(0, 0), row).examples
    assert [example.tokens.tolist() for example in examples] == kept
    with pytest.raises(BadRow, match="no_supervised_token"):
        builder(reader, max_length=1).build(Place(0, 0), row)


@pytest.mark.parametrize(
    ("position", "value", "problem"),
    [
        (18, 9, "a label that is not the id that follows"),
        (4, 3, "a label that is not the id that follows"),  # the end of the first conversation is gone
        (31, 5, "is not ids with a last one"),  # a label on padding
    ],
)
def test_packed_rows_that_do_not_add_up_are_set_aside(tmp_path: Path, position: int, value: int, problem: str) -> None:
    prefix = copied(tmp_path, "packed")
    ids = np.fromfile(prefix.with_suffix(".bin"), dtype="<i4")
    ids[position] = value
    ids.tofile(prefix.with_suffix(".bin"))
    with pytest.raises(BadRow, match=f"malformed_row: row 0 .*{problem}"):
        MegatronSftReader(prefix).read(0)
    assert len(MegatronSftReader(prefix).read(1).sequences) == 1


def rewritten(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("suffix", "change", "expected"),
    [
        (".idx", lambda data: b"", "starts with b'', not"),
        (".idx", lambda data: b"TNTIDX" + data[6:], r"is no index of a Megatron data set: it starts with b'TNTIDX"),
        (".idx", lambda data: data[:9] + struct.pack("<Q", 2) + data[17:], "has version 2, expected 1"),
        (".idx", lambda data: data[:17] + b"\x07" + data[18:], "its ids are of type float32"),
        (".idx", lambda data: data[:17] + b"\x63" + data[18:], "its ids are of type 99"),
        (".idx", lambda data: data[:-5], "has 97 bytes and tells of 102: it was cut short"),
        (".idx", lambda data: data + bytes(3), "is of a multimodal data set"),
        (".idx", lambda data: data[:-8] + struct.pack("<q", 2), "its documents are the sequences 0 to 2"),
        (".idx", lambda data: data[:18] + bytes(8) + struct.pack("<Q", 1) + bytes(8), "holds no rows"),
        (".bin", lambda data: data[:-2], "has 98 bytes and .* tells of 100: one of them was cut"),
        (".bin", lambda data: data + b"\x00\x00", "has 102 bytes and .* tells of 100"),
    ],
)
def test_damaged_files_are_refused(
    tmp_path: Path, suffix: str, change: Callable[[bytes], bytes], expected: str
) -> None:
    prefix = copied(tmp_path, "documents")
    rewritten(prefix.with_suffix(suffix), change)
    with pytest.raises(DataError, match=expected):
        MegatronReader(prefix)


@pytest.mark.parametrize("missing", [".bin", ".idx"])
def test_a_missing_half_is_named(tmp_path: Path, missing: str) -> None:
    prefix = copied(tmp_path, "documents")
    prefix.with_suffix(missing).unlink()
    with pytest.raises(DataError, match=f"documents{missing} cannot be read"):
        MegatronReader(prefix)


def test_one_bad_place_in_the_index_sets_one_row_aside(tmp_path: Path) -> None:
    prefix = copied(tmp_path, "documents")
    second_start = HEADER_BYTES + 3 * 4 + 8
    rewritten(
        prefix.with_suffix(".idx"),
        lambda data: data[:second_start] + struct.pack("<q", 10**9) + data[second_start + 8 :],
    )
    reader = MegatronReader(prefix)
    with pytest.raises(BadRow, match="malformed_row: row 1"):
        reader.read(1)
    assert reader.read(2).sequences[0].tokens.tolist() == EXPECTED["documents"][2]


def test_files_that_change_while_in_use_stop_the_run(tmp_path: Path) -> None:
    prefix = copied(tmp_path, "documents")
    reader = MegatronReader(prefix)
    rewritten(prefix.with_suffix(".bin"), lambda data: data + b"\x00\x00")
    with pytest.raises(DataError, match="changed while in use"):
        reader.read(0)
