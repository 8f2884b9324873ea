"""Megatron's .bin and .idx, byte for byte what megatron-core's own builder wrote."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llava_core.data.documents import TEXT
from llava_core.data.piece_template import parse_template
from llava_core.data.prepare.megatron import ConversationsTarget, DocumentsTarget
from llava_core.data.prepare.run import Preparation
from llava_core.data.prepare.tokens import TokensTarget
from llava_core.data.readers import reader_name
from llava_core.data.readers.llava import LlavaJsonReader
from llava_core.data.readers.megatron import MegatronReader, MegatronSftReader
from llava_core.data.readers.text import TextJsonReader, TextReader
from llava_core.errors import ConfigError, DataError
from llava_core.weights.tokenizer import load_tokenizer
from tests.unit.data.prepare.numbers import number_tokenizer
from tests.unit.data.prepare.support import Quiet, contents, listed, preparation

GOLDEN = Path(__file__).parents[3] / "golden" / "megatron"
EXPECTED: dict[str, list[Any]] = json.loads((GOLDEN / "expected.json").read_text())
TALK = parse_template('{human: ["{text}"], assistant: [{train: " {text}</s>"}]}', "talk", "here")
"""With the number tokenizer, a conversation's ids are those that its texts hold, between BOS and EOS."""


def documents(path: Path, output: Path, ids: list[list[int]], vocabulary: int) -> Preparation:
    """Documents whose ids are these, with BOS and EOS around them."""
    path.write_text("".join(f"{' '.join(map(str, document[1:-1]))}\n" for document in ids))
    rows = TokensTarget(number_tokenizer(vocabulary), TEXT, "text", takes_images=False)
    return preparation("megatron", path, TextReader(path), DocumentsTarget(rows, path.stem), output)


def conversations(path: Path, output: Path, rows: list[list[tuple[list[int], list[int]]]]) -> Preparation:
    """Conversations of one question and answer, packed in rows of 16."""
    turns = [
        [{"from": "human", "value": " ".join(map(str, q[1:]))}, {"from": "gpt", "value": " ".join(map(str, a[:-1]))}]
        for row in rows
        for q, a in row
    ]
    path.write_text(json.dumps([{"conversations": said} for said in turns]))
    made = TokensTarget(number_tokenizer(301), TALK, "talk.yaml", takes_images=False, max_length=16)
    target = ConversationsTarget(made, path.stem, max_length=16, pad_id=0)
    return preparation("megatron_sft", path, LlavaJsonReader(path), target, output)


def written(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(folder).items() if name.endswith((".bin", ".idx"))}


def golden(name: str) -> dict[str, bytes]:
    return {f"{name}{suffix}": (GOLDEN / f"{name}{suffix}").read_bytes() for suffix in (".bin", ".idx")}


@pytest.mark.parametrize(("name", "vocabulary"), [("documents", 301), ("wide", 128256)])
@pytest.mark.parametrize("part_size", [1, 100])
def test_documents_are_what_megatron_core_writes(tmp_path: Path, name: str, vocabulary: int, part_size: int) -> None:
    made = documents(tmp_path / f"{name}.txt", tmp_path / "out", EXPECTED[name], vocabulary)
    replace(made, part_size=part_size).run(Quiet())
    assert written(tmp_path / "out") == golden(name)
    assert contents(tmp_path / "out").keys() == {f"{name}.bin", f"{name}.idx", "prepared.json"}
    assert reader_name(tmp_path / "out" / name) == "megatron"


def test_the_files_of_preprocess_data(tmp_path: Path) -> None:
    """As `write.py` there says: text that Megatron-LM's own tool tokenised and wrote."""
    folder = GOLDEN / "preprocessed"
    rows = TokensTarget(load_tokenizer(folder / "tokenizer"), TEXT, "text", takes_images=False)
    path = folder / "documents.jsonl"
    target = DocumentsTarget(rows, "documents_text_document")
    preparation("megatron", path, TextJsonReader(path), target, tmp_path / "out").run(Quiet())
    names = ("documents_text_document.bin", "documents_text_document.idx")
    assert written(tmp_path / "out") == {name: (folder / name).read_bytes() for name in names}


@pytest.mark.parametrize("part_size", [1, 100])
def test_conversations_are_packed_as_by_pai(tmp_path: Path, part_size: int) -> None:
    made = conversations(tmp_path / "packed.json", tmp_path / "out", EXPECTED["packed"])
    replace(made, part_size=part_size).run(Quiet())
    assert written(tmp_path / "out") == golden("packed")
    assert len(MegatronSftReader(tmp_path / "out/packed")) == len(EXPECTED["packed"])
    with pytest.raises(ConfigError, match=r"name .*out/packed, and the reader megatron_sft"):
        reader_name(tmp_path / "out")


def test_long_conversations_are_cut_and_those_without_an_answer_left_out(tmp_path: Path) -> None:
    long, lost = ([1, *range(3, 13)], [*range(20, 30), 2]), ([1, *range(3, 30)], [7, 2])
    conversations(tmp_path / "packed.json", tmp_path / "out", [[long, lost, ([1, 5], [6, 2])]]).run(Quiet())
    assert listed(tmp_path / "out") == [(1, "no_supervised_token")]
    reader = MegatronSftReader(tmp_path / "out/packed")
    found = [sequence.tokens.tolist() for index in range(len(reader)) for sequence in reader.read(index).sequences]
    assert found == [[*long[0], *long[1]][:16], [1, 5, 6, 2]]


def test_documents_that_cannot_be_used_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "docs.jsonl"
    rows = [{"text": "5 6"}, {"text": " "}, {"text": "7", "image": "a.png"}, {"nothing": 1}, {"text": "8"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    made = TokensTarget(number_tokenizer(301), TEXT, "text", takes_images=False)
    preparation("megatron", path, TextJsonReader(path), DocumentsTarget(made, "docs"), tmp_path / "out").run(Quiet())
    assert listed(tmp_path / "out") == [(1, "empty_document"), (2, "unexpected_image"), (3, "malformed_row")]
    reader = MegatronReader(tmp_path / "out/docs")
    assert [reader.read(i).sequences[0].tokens.tolist() for i in range(len(reader))] == [[1, 5, 6, 2], [1, 8, 2]]


def test_an_index_of_many_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_core.data.prepare.tokens.BLOCK_BYTES", 8)
    monkeypatch.setattr("llava_core.data.prepare.megatron.BLOCK_BYTES", 8)
    documents(tmp_path / "documents.txt", tmp_path / "out", EXPECTED["documents"], 301).run(Quiet())
    assert written(tmp_path / "out") == golden("documents")


def test_what_has_no_place_there_is_refused(tmp_path: Path) -> None:
    text, talk = tmp_path / "a.txt", tmp_path / "a.json"
    made = documents(text, tmp_path / "out", EXPECTED["documents"], 301)
    said = conversations(talk, tmp_path / "out", EXPECTED["packed"])
    with pytest.raises(DataError, match="megatron holds documents, and this data set holds conversations"):
        preparation("megatron", talk, said.reader, made.target, tmp_path / "out").run(Quiet())
    with pytest.raises(DataError, match="megatron_sft holds conversations, and this data set holds texts"):
        preparation("megatron_sft", text, made.reader, said.target, tmp_path / "out").run(Quiet())
    talk.write_text(json.dumps([{"conversations": []}]))
    with pytest.raises(DataError, match=r"none of the 1 rows can be used; .*out.partial/quarantine.jsonl says why"):
        preparation("megatron_sft", talk, LlavaJsonReader(talk), said.target, tmp_path / "out").run(Quiet())
