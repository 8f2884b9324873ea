"""The loss on data that is not trained on: transformers' own, at its times, and without a trace in the training."""

from __future__ import annotations

import io
import json
import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._dynamo.testing import CompileCounter
from transformers import LlavaForConditionalGeneration

from llava_core.config import build_config
from llava_core.data.batch import Example
from llava_core.data.examples import Built, decoded
from llava_core.data.held_out import split_rows
from llava_core.engine import recompute
from llava_core.errors import ConfigError, DataError
from llava_core.plugins import Registry
from llava_core.testing.datasets import VOCAB_SIZE, TinyParts, tiny_parts
from llava_core.testing.live_bytes import LiveBytes
from llava_core.train import loop
from llava_core.train.interrupt import StopRequest
from llava_core.train.metrics import read_metrics, read_validations
from llava_core.train.plots import plot_loss
from llava_core.train.prepare import Run
from llava_core.train.trackers import TensorboardTracker
from llava_core.train.validation import perplexity, spread_rows
from tests.unit.train.support import (
    assert_bit_equal,
    engine_tensors,
    metrics_rows,
    quiet,
    run_to_end,
    tiny_run,
    tiny_settings,
)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> TinyParts:
    """Another data set."""
    return tiny_parts(tmp_path_factory.mktemp("other"), num_rows=11, seed=1)


def validated_on(other: TinyParts, *more: str) -> tuple[str, ...]:
    return (f"validation.path={other.data}", f"validation.images={other.images}", *more)


def validation_examples(run: Run) -> list[Example]:
    assert run.validation is not None
    loader = run.validation.loader
    found = list(decoded(loader.builder, loader.order(0), 0))
    return [example for one in found if isinstance(one, Built) for example in one.examples]


def transformers_loss(folder: Path, examples: list[Example]) -> float:
    """The mean over the supervised tokens of all samples, each alone. The export's embedding has more rows than the
    model that was trained, for the image's token, which no text becomes."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    total, count = 0.0, 0
    for example in examples:
        tokens = example.tokens.clone()
        for start, length in zip(example.image_starts, example.visual_tokens, strict=True):
            tokens[start : start + length] = model.config.image_token_index
        labels = tokens.where(example.supervised, -100)
        inputs = {} if example.pixels is None else {"pixel_values": example.pixels}
        with torch.no_grad():
            logits = model(input_ids=tokens[None], **inputs).logits[0, :-1, :VOCAB_SIZE]
        total += float(torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum"))
        count += example.num_labels
    return total / count


@pytest.mark.device
@pytest.mark.parametrize("kind", [(), ("train.loss=sequence_mean", "batch.micro_tokens=null", "batch.micro_size=2")])
def test_the_loss_is_transformers_own(
    kind: tuple[str, ...], parts: TinyParts, other: TinyParts, tmp_path: Path
) -> None:
    config = build_config(tiny_settings(parts, tmp_path / "run", *validated_on(other), *kind))
    loop.train_model(config, console=quiet())
    (found,) = read_validations(tmp_path / "run")
    examples = validation_examples(tiny_run(parts, tmp_path / "other", *validated_on(other)))
    expected = transformers_loss(tmp_path / "run" / "hf", examples)
    # Sums of fp32 in another order, by other attention kernels.
    assert found["validation_loss"] == pytest.approx(expected, rel=2e-6)
    assert found["validation_perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    assert (found["step"], found["validation_samples"]) == (6, 11)
    assert found["validation_label_tokens"] == sum(example.num_labels for example in examples)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_training_is_bit_equal_with_and_without(
    workers: int, parts: TinyParts, other: TinyParts, tmp_path: Path
) -> None:
    common = ("train.precision=bf16", "train.trainable=[vision,projector,language]", "train.recompute=selective")
    common = (*common, f"data.num_workers={workers}")
    without = tiny_run(parts, tmp_path / "without", *common)
    taken = run_to_end(without)
    run = tiny_run(parts, tmp_path / "run", *validated_on(other, "validation.every_steps=1"), *common)
    assert run_to_end(run) == taken
    assert_bit_equal(engine_tensors(run), engine_tensors(without))
    rows = [row for row in metrics_rows(tmp_path / "run") if "loss" in row]
    assert rows == metrics_rows(tmp_path / "without")
    assert run.loader.state_dict() == without.loader.state_dict()
    assert [row["step"] for row in read_validations(tmp_path / "run")] == [*range(1, 7)]


def test_nothing_is_dropped_or_drawn_where_the_training_drops(parts: TinyParts, tmp_path: Path) -> None:
    changes = ("lora.language.rank=2", "lora.language.alpha=4", "lora.dropout=0.5")
    run = tiny_run(parts, tmp_path / "run", *changes)
    batches = next(iter(run.loader)).batches
    run.engine.step(batches, 1.0)
    run.engine.step(batches, 1.0)  # adapters begin as zeros
    before = torch.get_rng_state()
    assert run.engine.evaluate(batches) == run.engine.evaluate(batches)
    assert torch.equal(torch.get_rng_state(), before)
    run.engine.step(batches, 1.0)
    assert not torch.equal(torch.get_rng_state(), before), "the training does"


def test_it_makes_no_graph_of_compiled_layers(
    parts: TinyParts, other: TinyParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which torch keeps a limited number, so that the training would run others."""
    counter = CompileCounter()
    monkeypatch.setattr(recompute, "COMPILER", counter)
    torch._dynamo.reset()
    run = tiny_run(parts, tmp_path / "run", "train.compile=true", *validated_on(other))
    batches = next(iter(run.loader)).batches[:1]
    run.engine.step(batches, 1.0)
    before = counter.frame_count
    assert before > 0
    run.engine.evaluate(batches)
    assert counter.frame_count == before
    torch._dynamo.reset()


def test_it_takes_less_memory_than_a_step(parts: TinyParts, tmp_path: Path) -> None:
    run = tiny_run(parts, tmp_path / "run", "train.recompute=full")
    batches = next(iter(run.loader)).batches
    run.engine.step(batches, 1.0)  # now the optimizer has its state
    with LiveBytes("cpu") as trying:
        run.engine.evaluate(batches)
    with LiveBytes("cpu") as training:
        run.engine.step(batches, 1.0)
    assert 0 < trying.peak < training.peak


def test_it_comes_at_its_intervals_and_at_the_end_and_is_shown(
    parts: TinyParts, other: TinyParts, tmp_path: Path
) -> None:
    settings = tiny_settings(parts, tmp_path / "run", *validated_on(other, "validation.every_steps=4"))
    to = Console(file=io.StringIO(), width=200)
    loop.train_model(build_config(settings), console=to)
    validations = read_validations(tmp_path / "run")
    assert [row["step"] for row in validations] == [4, 6]
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [*range(1, 7)]
    assert isinstance(to.file, io.StringIO)
    shown = to.file.getvalue()
    assert "11 rows, every 4 steps and at the end" in shown
    for row in validations:
        assert f"run: validation after step {row['step']}  loss {row['validation_loss']:.3f}  perplexity" in shown


class StopInValidation(StopRequest):
    """A signal that comes in the midst of the validation after some step."""

    def __init__(self, run: Run, step: int) -> None:
        super().__init__()
        evaluate, steps_taken = run.engine.evaluate, 0
        step_before = run.engine.step

        def counting(*arguments: Any) -> Any:
            nonlocal steps_taken
            steps_taken += 1
            return step_before(*arguments)

        def stopping(*arguments: Any) -> float:
            if steps_taken == step:
                self.signal = signal.SIGTERM
            return evaluate(*arguments)

        run.engine.step, run.engine.evaluate = counting, stopping  # type: ignore[method-assign]


@pytest.mark.parametrize("step", [3, 6])
def test_a_signal_cuts_it_short_and_the_resumed_run_makes_up_for_it(
    step: int, parts: TinyParts, other: TinyParts, tmp_path: Path
) -> None:
    changes = validated_on(other, "validation.every_steps=3", "log.trackers=[tensorboard]")
    whole = tiny_run(parts, tmp_path / "whole", *changes)
    run_to_end(whole)
    run = tiny_run(parts, tmp_path / "run", *changes)
    stop = StopInValidation(run, step)
    assert len(run_to_end(run, stop)) == step
    assert stop.exit_code == 143
    assert [row["step"] for row in read_validations(tmp_path / "run")] == [3][: step // 6]
    again = tiny_run(parts, tmp_path / "run", *changes)
    run_to_end(again)
    assert metrics_rows(tmp_path / "run") == metrics_rows(tmp_path / "whole")
    assert_bit_equal(engine_tensors(again), engine_tensors(whole))


def test_a_validation_that_is_taken_again_has_one_line(parts: TinyParts, other: TinyParts, tmp_path: Path) -> None:
    """Its checkpoint was made while it was cut short, and the next run dies before it saves another."""
    changes = validated_on(other, "validation.every_steps=3")
    run = tiny_run(parts, tmp_path / "run", *changes)
    run_to_end(run, StopInValidation(run, 3))
    for _ in range(2):
        again = tiny_run(parts, tmp_path / "run", *changes)
        run_to_end(again)  # saves nothing: checkpoint.every_steps is not set
    assert [row["step"] for row in read_validations(tmp_path / "run")] == [3, 6]


def test_tensorboard_and_the_picture_have_it(parts: TinyParts, other: TinyParts, tmp_path: Path) -> None:
    output = tmp_path / "run"
    changes = validated_on(other, "validation.every_steps=2", "log.trackers=[tensorboard]")
    run_to_end(tiny_run(parts, output, *changes))
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("validation/loss")
    expected = [row["validation_loss"] for row in read_validations(output)]
    assert [event.step for event in scalars] == [2, 4, 6]
    assert [event.value for event in scalars] == pytest.approx(expected, rel=1e-6)  # fp32 on disk
    assert {"validation/perplexity", "train/loss"} <= set(events.Tags()["scalars"])
    before = plot_loss(output).read_bytes()
    lines = (output / "metrics.jsonl").read_text().splitlines(keepends=True)
    (output / "metrics.jsonl").write_text("".join(line for line in lines if "validation_loss" not in line))
    assert plot_loss(output).read_bytes() != before


def test_a_resumed_run_that_begins_with_a_validation_keeps_the_step_in_tensorboard(tmp_path: Path) -> None:
    first = TensorboardTracker(tmp_path)
    first.log(3, {"loss": 1.0})
    first.close()
    second = TensorboardTracker(tmp_path)
    second.log(3, {"validation_loss": 2.0})
    second.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [3]


@pytest.mark.parametrize(
    ("num_rows", "fraction", "num_held"), [(100, 0.1, 10), (36, 0.2, 7), (5, 0.01, 1), (2, 0.9, 1)]
)
def test_rows_are_held_out_or_trained_on(num_rows: int, fraction: float, num_held: int) -> None:
    trained, held = split_rows(num_rows, fraction)
    assert len(held) == num_held
    assert sorted([*trained, *held]) == [*range(num_rows)]


def test_a_data_set_of_which_nothing_would_be_left_is_refused() -> None:
    with pytest.raises(ConfigError, match="of a data set of 1 rows none would be left to train on"):
        split_rows(1, 0.5)


def test_a_run_trains_on_no_row_that_it_holds_out(parts: TinyParts, tmp_path: Path) -> None:
    run = tiny_run(parts, tmp_path / "run", "validation.fraction=0.25", "train.max_steps=null", "train.epochs=2")
    seen = {id for step in run_to_end(run) for id in step}
    held = {example.id for example in validation_examples(run)}
    assert (len(seen), len(held)) == (27, 9)
    assert not seen & held
    other_seed = tiny_run(parts, tmp_path / "other", "validation.fraction=0.25", "train.seed=7")
    assert {example.id for example in validation_examples(other_seed)} == held


def test_a_bad_row_that_is_held_out_is_listed_by_its_place_in_the_file(parts: TinyParts, tmp_path: Path) -> None:
    """And does not count as another one each time."""
    rows = json.loads(parts.data.read_text())
    bad = int(split_rows(36, 0.3)[1][4])
    rows[bad]["conversations"] = []
    (tmp_path / "data.json").write_text(json.dumps(rows))
    changes = (f"data.path={tmp_path / 'data.json'}", "validation.fraction=0.3", "validation.every_steps=1")
    run_to_end(tiny_run(parts, tmp_path / "run", *changes, "train.max_steps=12"))
    listed = [json.loads(x) for x in (tmp_path / "run" / "validation-quarantine.jsonl").read_text().splitlines()]
    assert [(row["id"], row["index"]) for row in listed] == [(f"row-{bad}", bad)]
    assert not (tmp_path / "run" / "quarantine.jsonl").exists()
    assert {row["validation_samples"] for row in read_validations(tmp_path / "run")} == {9}


@pytest.mark.parametrize("most", [None, 1, 3, 10, 11])
def test_some_of_the_rows_are_spread_over_all(most: int | None) -> None:
    rows = spread_rows(10, most).tolist()
    assert rows == sorted(set(rows))
    assert len(rows) == min(10, most or 10)
    assert max(np.diff([*rows, 10])) <= 10 // len(rows) + 1


def test_no_more_rows_are_taken_than_asked_for(parts: TinyParts, other: TinyParts, tmp_path: Path) -> None:
    run_to_end(tiny_run(parts, tmp_path / "run", *validated_on(other, "validation.max_samples=4")))
    assert [row["validation_samples"] for row in read_validations(tmp_path / "run")] == [4]


def test_several_sources_count_as_one_and_take_what_is_not_theirs_from_the_data(
    parts: TinyParts, other: TinyParts, tmp_path: Path
) -> None:
    (tmp_path / "documents.txt").write_text("one line\nand another\n")
    sources = f"validation.sources=[{{path: {other.data}}}, {{path: {tmp_path / 'documents.txt'}, images: null}}]"
    changes = (sources, f"validation.images={other.images}", "data.template=xtuner_vicuna")
    run = tiny_run(parts, tmp_path / "run", *changes)
    assert run.validation is not None
    found = run.validation.loader.builder.sources.sources
    assert [source.template.name for source in found if source.template] == ["xtuner_vicuna", "text"]
    run_to_end(run)
    assert [row["validation_samples"] for row in read_validations(tmp_path / "run")] == [13]


def test_conversations_have_the_template_of_those_that_are_trained_on(
    parts: TinyParts, other: TinyParts, tmp_path: Path
) -> None:
    sources = f"data.sources=[{{path: {parts.data}, template: llama_2}}]"
    run = tiny_run(parts, tmp_path / "run", "data.path=null", sources, *validated_on(other))
    assert run.validation is not None
    (source,) = run.validation.loader.builder.sources.sources
    assert source.template is not None
    assert source.template.name == "llama_2"


def test_data_that_cannot_be_used_is_found_before_the_first_step(
    parts: TinyParts, other: TinyParts, tmp_path: Path
) -> None:
    rows = json.loads(other.data.read_text())[:5]
    (tmp_path / "data.json").write_text(json.dumps([row | {"conversations": []} for row in rows]))
    run = tiny_run(parts, tmp_path / "run", f"validation.path={tmp_path / 'data.json'}")
    with pytest.raises(DataError, match="no row of the validation data can be used"):
        loop.run_steps(run, 0, StopRequest(), Registry.discover(), quiet())
    assert read_metrics(tmp_path / "run") == []


def test_paths_that_are_not_there_are_named(parts: TinyParts, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"validation\.path = /nowhere/v: no such file"):
        tiny_run(parts, tmp_path / "run", "validation.path=/nowhere/v")


def test_images_for_a_model_that_sees_nothing_are_refused(parts: TinyParts, other: TinyParts, tmp_path: Path) -> None:
    language = ("model.vision=null", "model.language=null", f"model.path={parts.language}", "data.images=null")
    with pytest.raises(ConfigError, match=r"validation\.images is set, and this model has no vision tower"):
        tiny_run(parts, tmp_path / "run", *language, "train.trainable=[language]", *validated_on(other))
    source = f"validation.sources=[{{path: {parts.data}, images: {parts.images}}}]"
    with pytest.raises(ConfigError, match=r"validation\.sources\.0\.images is set, and this model has no vision tower"):
        tiny_run(parts, tmp_path / "run", *language, "train.trainable=[language]", source)


def test_it_may_change_in_a_resumed_run_but_not_what_is_held_out(
    parts: TinyParts, other: TinyParts, tmp_path: Path
) -> None:
    saving = ("checkpoint.every_steps=3", "checkpoint.keep=null")
    run_to_end(tiny_run(parts, tmp_path / "run", *saving))
    assert run_to_end(tiny_run(parts, tmp_path / "run", *saving, *validated_on(other))) == []
    assert [row["step"] for row in read_validations(tmp_path / "run")] == [6]
    assert run_to_end(tiny_run(parts, tmp_path / "run", *saving)) == []
    assert [row["step"] for row in read_validations(tmp_path / "run")] == [6]  # what it was before is not lost
    with pytest.raises(Exception, match=r"validation\.fraction: was None, is 0\.1"):
        run_to_end(tiny_run(parts, tmp_path / "run", *saving, "validation.fraction=0.1"))


def test_a_perplexity_beyond_a_float_is_infinite() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(1e4) == math.inf
