"""Runs on several data sets, and on documents: the loss, the resume, the export, and what is refused."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from importlib.metadata import EntryPoint
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llava_core.config import build_config
from llava_core.engine.processes import Processes
from llava_core.errors import CheckpointError, ConfigError, DataError, LlavaError
from llava_core.plugins import Registry
from llava_core.testing.datasets import TinyParts
from llava_core.train.data import open_readers
from llava_core.train.loop import train_model
from llava_core.train.report import described_data
from tests.unit.train.support import (
    assert_bit_equal,
    engine_tensors,
    metrics_rows,
    quiet,
    run_to_end,
    tiny_run,
    tiny_settings,
)

DOCUMENTS = ["It is red.", "Say blue. " * 60, "Name the colour.", "grey", "It is green indeed."]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "documents.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS))
    return path


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(f"line {i} is blue" for i in range(7)))
    return path


def mixed(parts: TinyParts, *others: dict[str, Any], **first: Any) -> tuple[str, ...]:
    sources = [{"path": str(parts.data), "images": str(parts.images)} | first, *others]
    return ("data.path=null", "data.images=null", f"data.sources={json.dumps(sources)}", "data.max_length=256")


def text_only(parts: TinyParts, path: Path) -> tuple[str, ...]:
    model = ("model.vision=null", "model.language=null", f"model.path={parts.language}")
    return (*model, f"data.path={path}", "data.images=null", "train.trainable=[language]")


def test_a_mixed_run_resumed_with_other_workers_and_moved_files_ends_bit_equal(
    parts: TinyParts, tmp_path: Path, texts: Path, lines: Path
) -> None:
    def changes(texts: Path) -> tuple[str, ...]:
        others = ({"path": str(texts), "reader": "text_json", "weight": 0.2}, {"path": str(lines), "weight": 0.3})
        return (*mixed(parts, *others, weight=0.5), "train.max_steps=8", "checkpoint.keep=null")

    whole = tiny_run(parts, tmp_path / "whole", *changes(texts), "checkpoint.every_steps=3")
    taken = run_to_end(whole)
    assert {name.partition("-")[0] for step in taken for name in step} > {"row", "row0"}, "of every source"
    shutil.copytree(tmp_path / "whole/checkpoints/step-00000003", tmp_path / "run/checkpoints/step-00000003")
    shutil.copy(tmp_path / "whole/metrics.jsonl", tmp_path / "run")
    moved = texts.rename(tmp_path / "moved.jsonl")
    again = tiny_run(parts, tmp_path / "run", *changes(moved), "data.num_workers=2")
    assert run_to_end(again) == taken[3:]
    assert metrics_rows(tmp_path / "run") == metrics_rows(tmp_path / "whole")
    assert sum(row["overlong"] for row in metrics_rows(tmp_path / "run")) > 0
    assert_bit_equal(engine_tensors(again), engine_tensors(whole))


def test_other_weights_of_the_sources_are_another_run(parts: TinyParts, tmp_path: Path, lines: Path) -> None:
    def changes(weight: float) -> tuple[str, ...]:
        return (*mixed(parts, {"path": str(lines), "weight": weight}, weight=1.0), "train.max_steps=1")

    run_to_end(tiny_run(parts, tmp_path / "run", *changes(1.0), "checkpoint.every_steps=1"))
    with pytest.raises(CheckpointError, match=r"data\.sources\.1\.weight: was 1\.0, is 2\.0"):
        run_to_end(tiny_run(parts, tmp_path / "run", *changes(2.0)))


def test_the_loss_of_documents_is_transformers_own(parts: TinyParts, tmp_path: Path, texts: Path) -> None:
    """Each document by itself through transformers: packed, none attends to another and every token is learnt."""
    changes = (*text_only(parts, texts), "data.reader=text_json", "data.max_length=256", "data.order=sequential")
    run = tiny_run(parts, tmp_path / "run", *changes)
    step = next(iter(run.loader))
    assert len(step.batches) < step.counts.samples, "packed"
    tokenizer = AutoTokenizer.from_pretrained(parts.language)
    model = AutoModelForCausalLM.from_pretrained(parts.language, dtype=torch.float32)
    total, count = 0.0, 0
    for text in DOCUMENTS:
        ids = torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
        for start in range(0, len(ids) - 1, 255):
            piece = ids[start : start + 256][None]
            labels = piece.numel() - 1
            total += model(input_ids=piece, labels=piece).loss.item() * labels
            count += labels
    assert step.labelled.tokens == count
    result = run.engine.step(step.batches, 1.0, step.labelled)
    # fp32 sums of a few hundred terms in another order; measured 2e-7.
    assert result.loss == pytest.approx(total / count, rel=2e-6)


def test_the_export_of_documents_continues_texts(parts: TinyParts, tmp_path: Path, lines: Path) -> None:
    result = train_model(
        build_config(tiny_settings(parts, tmp_path / "run", *text_only(parts, lines), "train.max_steps=1")),
        console=quiet(),
    )
    assert result.export is not None
    tokenizer = AutoTokenizer.from_pretrained(result.export)
    messages = [{"role": "user", "content": "line 3 is"}]
    assert tokenizer.apply_chat_template(messages)["input_ids"] == tokenizer("line 3 is")["input_ids"]
    AutoModelForCausalLM.from_pretrained(result.export)


def test_the_templates_of_sources_and_of_the_export(parts: TinyParts, tmp_path: Path, lines: Path) -> None:
    run = tiny_run(parts, tmp_path / "run", *mixed(parts, {"path": str(lines)}, template="llama_2"))
    found = [source.template.name for source in run.loader.builder.sources.sources if source.template]
    assert (found, run.template.name) == (["llama_2", "text"], "llama_2")
    chosen = tiny_run(
        parts, tmp_path / "run", *mixed(parts, {"path": str(lines)}, template="llama_2"), "data.template=v1"
    )
    assert chosen.template.name == "v1"


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({"template": "text"}, {}, r"data\.sources\.0\.template = 'text' is for documents"),
        ({}, {"template": "v1"}, r"data\.sources\.1\.template = 'v1': this data set holds documents"),
        ({}, {"split": "train"}, "the reader 'text' knows no splits"),
        ({}, {"reader": "txt"}, "unknown reader 'txt'"),
        ({}, {"path": "/nowhere/b.txt"}, r"data\.sources\.1\.path = /nowhere/b.txt: no such file"),
        ({"images": "/nowhere/i"}, {}, r"data\.sources\.0\.images = /nowhere/i: no such file"),
    ],
)
def test_what_a_source_cannot_be_is_refused(
    first: dict[str, str], second: dict[str, str], expected: str, parts: TinyParts, tmp_path: Path, lines: Path
) -> None:
    with pytest.raises(LlavaError, match=expected):
        tiny_run(parts, tmp_path / "run", *mixed(parts, {"path": str(lines)} | second, **first))
    assert not (tmp_path / "run").exists()


def test_conversations_with_several_templates_need_one_for_the_export(parts: TinyParts, tmp_path: Path) -> None:
    changes = mixed(parts, {"path": str(parts.data), "images": str(parts.images), "template": "v1"}, template="llama_2")
    with pytest.raises(ConfigError, match="the sources have the templates llama_2, v1: set data.template"):
        tiny_run(parts, tmp_path / "run", *changes)


def test_shards_train_as_the_files_that_are_in_them(parts: TinyParts, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for row in json.loads(parts.data.read_text()):
            files = {"json": json.dumps(row).encode()}
            if "image" in row:
                files["png"] = (parts.images / row["image"]).read_bytes()
            for suffix, data in files.items():
                member = tarfile.TarInfo(f"{row['id']}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    shards = tiny_run(parts, tmp_path / "run", f"data.path={tmp_path / 'shard.tar'}", "data.images=null")
    files_alone = tiny_run(parts, tmp_path / "run")
    for found, expected in zip(islice(shards.loader, 5), islice(files_alone.loader, 5), strict=True):
        for batch, wanted in zip(found.batches, expected.batches, strict=True):
            assert (batch.ids, batch.counts) == (wanted.ids, wanted.counts)
            assert torch.equal(batch.tokens, wanted.tokens)
            assert torch.equal(batch.pixels, wanted.pixels)


def test_token_ids_take_no_template_and_join_the_others(parts: TinyParts, tmp_path: Path) -> None:
    packed = Path(__file__).parents[2] / "golden" / "megatron" / "packed"
    source = {"path": str(packed), "reader": "megatron_sft", "weight": 1}
    run = tiny_run(parts, tmp_path / "run", *mixed(parts, source, weight=3), "data.order=sequential")
    names = {name for batch in next(iter(run.loader)).batches for name in batch.ids}
    assert {"row0", "row-0"} <= names
    with pytest.raises(ConfigError, match=r"data\.sources\.1\.template = 'v1': this data set holds token ids"):
        tiny_run(parts, tmp_path / "run", *mixed(parts, source | {"template": "v1"}, weight=3))


def test_an_empty_file_among_the_sources_is_named(parts: TinyParts, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(DataError, match=r"empty.txt holds no rows"):
        tiny_run(parts, tmp_path / "run", *mixed(parts, {"path": str(tmp_path / "empty.txt")}))


def test_images_of_a_source_need_a_model_that_sees(parts: TinyParts, tmp_path: Path, lines: Path) -> None:
    model = ("model.vision=null", "model.language=null", f"model.path={parts.language}", "train.trainable=[language]")
    with pytest.raises(ConfigError, match=r"data\.sources\.0\.images is set, and this model has no vision tower"):
        tiny_run(parts, tmp_path / "run", *mixed(parts, {"path": str(lines)}), *model)


def test_the_plan_names_every_source(parts: TinyParts, tmp_path: Path, lines: Path) -> None:
    run = tiny_run(parts, tmp_path / "run", *mixed(parts, {"path": str(lines), "weight": 3}, weight=1))
    assert described_data(run).split("\n") == [
        "data.json: 36 rows, template v1, weight 1",
        "lines.txt: 7 rows, template text, weight 3",
    ]


def test_readers_are_named_without_loading_them(
    parts: TinyParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dummy_readers.py").write_text(
        "from llava_core.plugins import Contribution, hookimpl\n"
        "@hookimpl\n"
        "def llava_register_readers():\n"
        "    return [Contribution('lacking', 'nowhere_at_all:Reader', 'needs what is missing', api_version=1)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry([EntryPoint("dummy", "dummy_readers", "llava_core")])
    config = build_config(tiny_settings(parts, tmp_path / "run", f"data.path={tmp_path / 'a.csv'}"))
    with pytest.raises(ConfigError, match=r"no reader is known for .*a\.csv: .* name the reader, one of lacking"):
        open_readers(config, registry, Processes())


def test_the_steps_of_a_group_are_the_configs(parts: TinyParts, tmp_path: Path) -> None:
    of_one, of_two = (
        tiny_run(parts, tmp_path / f"run{mult}", "data.order=length_grouped", f"data.mega_batch_mult={mult}").loader
        for mult in (1, 2)
    )
    assert sorted(of_one.order(0)) == sorted(of_two.order(0))
    assert of_one.order(0).tolist() != of_two.order(0).tolist()
