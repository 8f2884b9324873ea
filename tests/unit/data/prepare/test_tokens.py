"""Rows that were tokenised before: the batches, and the list of bad rows, are those of the rows themselves."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from llava_core.data.conversation import Span
from llava_core.data.documents import TEXT
from llava_core.data.encoding import compact, expanded
from llava_core.data.examples import ExampleBuilder
from llava_core.data.fingerprint import differences, fingerprint
from llava_core.data.image_side import ImageSide
from llava_core.data.image_store import ImageStore
from llava_core.data.images import ImageProcessor
from llava_core.data.loader import Batching, Step, StepLoader
from llava_core.data.overlong import Overlong
from llava_core.data.prepare.tokens import TokensTarget
from llava_core.data.quarantine import Quarantine
from llava_core.data.readers import Reader, reader_name
from llava_core.data.readers.llava import LlavaJsonlReader
from llava_core.data.readers.megatron import MegatronReader
from llava_core.data.readers.text import TextReader
from llava_core.data.readers.tokens import TokensReader
from llava_core.data.readers.webdataset import WebdatasetReader
from llava_core.data.records import Turn, modality_length
from llava_core.data.sampler import Grouping, Order, epoch_order
from llava_core.data.sources import Source, Sources
from llava_core.data.templates import BUILTIN_TEMPLATES, Template, tokenizer_template
from llava_core.data.tokens import encode_whole
from llava_core.errors import BadRow, ConfigError, DataError
from llava_core.testing.datasets import TinyParts
from llava_core.testing.tokenizers import LLAMA_3_CHAT_TEMPLATE, train_llama3_tokenizer, train_llama_tokenizer
from llava_core.weights.export import exported_tokenizer
from llava_core.weights.tokenizer import load_tokenizer
from tests.unit.data.prepare.numbers import number_tokenizer
from tests.unit.data.prepare.support import BAD_LINES, Data, Quiet, contents, listed, preparation, write_lines

STEPS = 10  # two epochs of five


@pytest.fixture
def data(parts: TinyParts, tmp_path: Path) -> Data:
    return write_lines(parts, tmp_path / "data.jsonl", bad=True)


def lengths(reader: Reader) -> list[int]:
    """As a run finds them: a row that cannot be read counts as a word of text."""
    found = []
    for index in range(len(reader)):
        try:
            found.append(modality_length(reader.read(index)) or -1)
        except BadRow:
            found.append(-1)
    return found


def steps(
    parts: TinyParts,
    reader: Reader,
    template: Template,
    quarantine: Path,
    *,
    order: Order = "shuffled",
    padded: bool = False,
    sees: bool = True,
    max_length: int = 256,
    overlong: Overlong | None = None,
) -> list[Step]:
    """Two epochs of a run."""
    store = ImageStore(parts.images, 10**6) if sees else None
    images = ImageSide(ImageProcessor.from_folder(parts.vision, "pad"), tile_tokens=9) if sees else None
    builder = ExampleBuilder(
        sources=Sources([Source(reader, template, store)]),
        tokenizer=load_tokenizer(parts.language),
        images=images,
        pad_id=3,
        vocab_size=320,
        max_length=max_length,
        overlong=overlong,
    )
    size = (None, 2) if padded else (2048, None)
    grouping = Grouping(lengths(reader), 2, 4) if order == "modality_length" else None
    loader = StepLoader(
        builder,
        lambda epoch: epoch_order(order, len(reader), 5, epoch, grouping),
        len(reader),
        Batching(8, *size, pad_id=3, image_size=24),
        Quarantine(quarantine, 1.0),
        0,
    )
    return list(islice(loader, STEPS))


def values(found: Sequence[Step]) -> list[Any]:
    """Every field of every batch, tensors with their types."""

    def plain(value: Any) -> Any:
        return (str(value.dtype), value.tolist()) if isinstance(value, Tensor) else value

    batches = [batch for step in found for batch in step.batches]
    return [[plain(getattr(batch, f.name)) for f in fields(batch)] for batch in batches] + [
        (step.counts, step.labelled, step.num_overlong) for step in found
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"order": "shuffled"},
        {"order": "modality_length", "padded": True},
        {"order": "sequential", "sees": False},
        {"max_length": 60, "overlong": "split"},
        {"max_length": 180, "overlong": "drop"},
        {"max_length": 180},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_batches_are_those_of_the_rows(data: Data, tmp_path: Path, settings: dict[str, Any]) -> None:
    data.tokens(tmp_path / "out").run(Quiet())
    readers = {"live": LlavaJsonlReader(data.path), "kept": TokensReader(tmp_path / "out")}
    template = BUILTIN_TEMPLATES["v1"]
    found = {
        name: values(steps(data.parts, reader, template, tmp_path / f"{name}.jsonl", **settings))
        for name, reader in readers.items()
    }
    assert found["kept"] == found["live"]
    assert (tmp_path / "kept.jsonl").read_bytes() == (tmp_path / "live.jsonl").read_bytes()
    assert len(listed(tmp_path / "out")) == 4, "of the six bad rows two have images that only a run looks for"


@pytest.mark.parametrize("name", sorted(BUILTIN_TEMPLATES))
def test_every_template_gives_the_same_ids(data: Data, tmp_path: Path, name: str) -> None:
    data.tokens(tmp_path / "out", name).run(Quiet())
    live, kept = LlavaJsonlReader(data.path), TokensReader(tmp_path / "out")
    assert (kept.template, kept.content, kept.usual_overlong) == (name, "conversations", "truncate")
    found = [
        values(steps(data.parts, reader, BUILTIN_TEMPLATES[name], tmp_path / f"{number}.jsonl", max_length=2048))
        if name != "plain"
        else [reader.read(0).id]
        for number, reader in enumerate((live, kept))
    ]
    assert found[0] == found[1]


def test_documents_are_kept_alike(parts: TinyParts, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"It is {n} times <image> red.\n" for n in range(18)))
    reader = TextReader(path)
    target = TokensTarget(load_tokenizer(parts.language), TEXT, "text")
    preparation("tokens", path, reader, target, tmp_path / "out").run(Quiet())
    kept = TokensReader(tmp_path / "out")
    assert (kept.content, kept.usual_overlong) == ("texts", "split")
    found = [values(steps(parts, r, TEXT, tmp_path / "q", sees=False, max_length=16)) for r in (reader, kept)]
    assert found[0] == found[1]


def test_images_take_their_places_when_their_size_is_known() -> None:
    """Several images, expanded to any sizes."""
    tokenizer = number_tokenizer(200)
    turns = [Turn("human", "<image>\n1 2"), Turn("assistant", "3 4"), Turn("human", "<image>"), Turn("assistant", "5")]
    conversation = BUILTIN_TEMPLATES["v1"].render(turns)
    assert conversation.num_images == 2
    sequence, starts = compact(conversation, tokenizer)
    for visual_tokens in ((1, 1), (2, 7), (5, 1)):
        live = encode_whole(conversation, tokenizer, visual_tokens=visual_tokens, pad_id=9)
        kept = expanded(sequence, starts, visual_tokens=visual_tokens, pad_id=9)
        assert torch.equal(live.tokens, kept.tokens)
        assert live.tokens.dtype == kept.tokens.dtype
        assert torch.equal(live.supervised, kept.supervised)
        assert (live.image_starts, live.visual_tokens) == (kept.image_starts, kept.visual_tokens)


def test_large_vocabularies_are_kept_in_four_bytes(tmp_path: Path) -> None:
    for size, kind in ((65499, "U16"), (65500, "I32")):
        path, output = tmp_path / "text.txt", tmp_path / str(size)
        path.write_text(f"{size - 1} 17\n")
        reader = TextReader(path)
        preparation("tokens", path, reader, TokensTarget(number_tokenizer(size), TEXT, "text"), output).run(Quiet())
        with safe_open(output / "tokens-00000.safetensors", framework="numpy") as file:
            assert file.get_slice("tokens").get_dtype() == kind
        assert TokensReader(output).read(0).sequence.tokens.tolist() == [1, size - 1, 17, 2]


def test_the_folder_names_its_reader_and_survives_pickling(data: Data, tmp_path: Path) -> None:
    data.tokens(tmp_path / "out").run(Quiet())
    assert reader_name(tmp_path / "out") == "tokens"
    reader = TokensReader(tmp_path / "out")
    again = pickle.loads(pickle.dumps(reader))
    assert np.array_equal(again.read(0).sequence.tokens, reader.read(0).sequence.tokens)
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    there = TokensReader(moved)
    assert {**there.fingerprint, "path": ""} == {**reader.fingerprint, "path": ""}


def test_another_tokenizer_or_template_is_refused_by_what_differs(data: Data, tmp_path: Path) -> None:
    data.tokens(tmp_path / "out").run(Quiet())
    reader, v1 = TokensReader(tmp_path / "out"), BUILTIN_TEMPLATES["v1"]
    tokenizer = load_tokenizer(data.parts.language)
    reader.check(tokenizer, v1)
    reader.check(tokenizer, replace(v1, name="moved", stop=("x",)))
    with pytest.raises(ConfigError, match=r"template 'v1':\n  template: was '\w+', is '\w+'\nName"):
        reader.check(tokenizer, BUILTIN_TEMPLATES["llama_2"])
    corpus = ["It is red.", "Which colour?", "It is green."] * 50
    other = train_llama_tokenizer(tmp_path / "other", corpus, 290, legacy=False)
    with pytest.raises(ConfigError, match="tokenizer.vocabulary: was"):
        reader.check(other, v1)
    legacy = load_tokenizer(_copy_with(data.parts.language, tmp_path / "legacy", legacy=True))
    with pytest.raises(ConfigError, match=r"tokenizer\.(normalizer|pre_tokenizer): was"):
        reader.check(legacy, v1)


@pytest.mark.parametrize("name", ["v1", "llama_3", "mistral"])
def test_the_tokenizer_of_an_export_is_the_same(data: Data, tmp_path: Path, name: str) -> None:
    """Its `<image>` and what it does after one concern no text that is trained."""
    data.tokens(tmp_path / "out", name).run(Quiet())
    template = BUILTIN_TEMPLATES[name]
    exported_tokenizer(load_tokenizer(data.parts.language), template, multimodal=True).save_pretrained(tmp_path / "hf")
    TokensReader(tmp_path / "out").check(load_tokenizer(tmp_path / "hf"), template)


def test_a_tokenizers_own_template_is_part_of_what_it_was_made_with(data: Data, tmp_path: Path) -> None:
    tokenizer = train_llama3_tokenizer(tmp_path / "llama3", ["It is red."] * 20, 300)
    template = tokenizer_template(tokenizer)
    target = TokensTarget(tokenizer, template, "tokenizer")
    preparation("tokens", data.path, LlavaJsonlReader(data.path), target, tmp_path / "out").run(Quiet())
    reader = TokensReader(tmp_path / "out")
    reader.check(tokenizer, template)
    tokenizer.chat_template = LLAMA_3_CHAT_TEMPLATE.replace("| trim", "")
    with pytest.raises(ConfigError, match="tokenizer.chat_template: was"):
        reader.check(tokenizer, tokenizer_template(tokenizer))


def test_special_tokens_that_a_tokenizers_own_template_writes(data: Data, tmp_path: Path) -> None:
    tokenizer = train_llama3_tokenizer(tmp_path / "llama3", ["It is red."] * 20, 300)
    template = tokenizer_template(tokenizer)
    before = fingerprint(tokenizer, template)
    tokenizer.bos_token = "<|end_of_text|>"
    first = template.render([Turn("human", "What?"), Turn("assistant", "Red.")]).pieces[0]
    assert isinstance(first, Span)
    assert first.text.startswith("<|end_of_text|>")
    changed = differences(before, fingerprint(tokenizer, template))
    assert changed == "\n  tokenizer.bos_token: was '<|begin_of_text|>', is '<|end_of_text|>'"


def test_marks_of_special_tokens_that_are_split(data: Data) -> None:
    tokenizer, v1 = load_tokenizer(data.parts.language), BUILTIN_TEMPLATES["v1"]
    before, ids = fingerprint(tokenizer, v1), tokenizer("a</s>")["input_ids"]
    tokenizer.split_special_tokens = True
    assert tokenizer("a</s>")["input_ids"] != ids
    changed = differences(before, fingerprint(tokenizer, v1))
    assert "tokenizer.split_special_tokens: was 'False', is 'True'" in changed


def test_an_incomplete_or_foreign_folder_is_refused(data: Data, tmp_path: Path) -> None:
    data.tokens(tmp_path / "out").run(Quiet())
    data.webdataset(tmp_path / "wds").run(Quiet())
    with pytest.raises(DataError, match="was prepared as webdataset, not as token ids"):
        TokensReader(tmp_path / "wds")
    with pytest.raises(DataError, match="is no prepared data set: .*prepared.json: No such file"):
        TokensReader(tmp_path)
    part = tmp_path / "out/tokens-00003.safetensors"
    whole = part.read_bytes()
    reader = TokensReader(tmp_path / "out")
    part.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=rf"tokens-00003.safetensors has {len(whole) - 1} bytes, expected {len(whole)}"):
        TokensReader(tmp_path / "out")
    with pytest.raises(DataError, match="changed while in use"):
        reader.read(16)
    part.write_bytes(b"\xff" * len(whole))
    with pytest.raises(DataError, match="row 16 cannot be read from"):
        reader.read(16)
    part.unlink()
    with pytest.raises(DataError, match="tokens-00003.safetensors is missing"):
        reader_name(tmp_path / "out")
    manifest = json.loads((tmp_path / "out/prepared.json").read_text())
    odd: tuple[dict[str, Any], ...] = ({"to": 3}, {"settings": []}, {"source": None}, {"part_size": 0})
    for request in odd:
        damaged = manifest | {"request": manifest["request"] | request}
        (tmp_path / "out/prepared.json").write_text(json.dumps(damaged))
        with pytest.raises(DataError, match="prepared.json cannot be read"):
            reader_name(tmp_path / "out")
    (tmp_path / "out/prepared.json").write_text("{")
    with pytest.raises(DataError, match="prepared.json cannot be read"):
        TokensReader(tmp_path / "out")


@pytest.mark.parametrize("num_bad", [1, 5], ids=["the last of a part", "all of a part"])
def test_rows_set_aside_where_a_parts_tokens_end(parts: TinyParts, tmp_path: Path, num_bad: int) -> None:
    data = write_lines(parts, tmp_path / "data.jsonl", bad=False)
    lines = data.path.read_text().splitlines()[:10]
    lines[10 - num_bad :] = [BAD_LINES[25]] * num_bad
    data.path.write_text("\n".join(lines))
    data.tokens(tmp_path / "out").run(Quiet())
    reader = TokensReader(tmp_path / "out")
    for index in range(10):
        row = reader.read(index)
        assert (row.refused is not None) == (index >= 10 - num_bad) == (row.sequence.tokens.size == 0)
        assert (row.sequence.tokens.dtype, row.sequence.supervised.dtype) == (np.int64, np.bool_)


def test_ids_beyond_the_models_vocabulary_are_set_aside(data: Data, tmp_path: Path) -> None:
    data.tokens(tmp_path / "out").run(Quiet())
    reader = TokensReader(tmp_path / "out")
    builder = ExampleBuilder(
        Sources([Source(reader, BUILTIN_TEMPLATES["v1"])]), None, None, 0, vocab_size=5, max_length=99, overlong=None
    )
    with pytest.raises(BadRow, match="unknown_token"):
        builder.build(builder.sources.find(4), reader.read(4))


def test_images_that_rows_bring_along_are_refused(data: Data, tmp_path: Path) -> None:
    data.webdataset(tmp_path / "wds").run(Quiet())
    tokenizer, v1 = load_tokenizer(data.parts.language), BUILTIN_TEMPLATES["v1"]
    again = preparation(
        "tokens",
        tmp_path / "wds",
        WebdatasetReader(tmp_path / "wds"),
        TokensTarget(tokenizer, v1, "v1"),
        tmp_path / "out",
    )
    with pytest.raises(DataError, match="row 0 brings its image 'row0.png' along"):
        again.run(Quiet())


def test_tokens_are_not_tokenised_again(data: Data, tmp_path: Path) -> None:
    golden = Path(__file__).parents[3] / "golden/megatron/documents"
    target = TokensTarget(load_tokenizer(data.parts.language), BUILTIN_TEMPLATES["v1"], "v1")
    with pytest.raises(DataError, match="it was tokenised before"):
        preparation("tokens", golden.with_suffix(".idx"), MegatronReader(golden), target, tmp_path / "o").run(Quiet())
    assert "o.partial" not in {path.name for path in tmp_path.iterdir()}
    assert contents(tmp_path).keys() == {"data.jsonl"}


@pytest.mark.parametrize("kind", ["tokens", "webdataset"])
def test_what_was_prepared_as_tokens_is_refused_by_name(data: Data, tmp_path: Path, kind: str) -> None:
    data.tokens(tmp_path / "out").run(Quiet())
    again = replace(getattr(data, kind)(tmp_path / "again"), source=tmp_path / "out")
    with pytest.raises(DataError, match="out was prepared as token ids: prepare the data that they were made of"):
        replace(again, reader=TokensReader(tmp_path / "out")).run(Quiet())
    assert not (tmp_path / "again.partial").exists()


def _copy_with(folder: Path, copy: Path, **settings: Any) -> Path:
    shutil.copytree(folder, copy)
    path = copy / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    (copy / "tokenizer.json").unlink(missing_ok=True)
    return copy
