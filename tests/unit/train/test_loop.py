"""A whole run, and what is refused before one starts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from llava_core.config import build_config, load_config
from llava_core.engine import recompute
from llava_core.errors import ConfigError, PluginError
from llava_core.plugins import Registry
from llava_core.testing.datasets import TinyParts
from llava_core.train.loop import train_model
from llava_core.train.prepare import Run
from llava_core.train.schedule import build_schedule, is_due
from tests.unit.train.support import metrics_rows, prepare_alone, quiet, tiny_run, tiny_settings


@pytest.mark.device
def test_a_run_learns_and_leaves_everything(parts: TinyParts, tmp_path: Path) -> None:
    output = tmp_path / "run"
    changes = ("train.max_steps=15", "optimizer.learning_rate=3e-3", "log.trackers=[tensorboard]")
    config = build_config(tiny_settings(parts, output, *changes))
    result = train_model(config, console=quiet())
    assert (result.steps, result.exit_code, result.export) == (15, 0, output / "hf")
    losses = [row["loss"] for row in metrics_rows(output)]
    assert losses[0] > math.log(320) * 0.9, "an untrained model guesses among 320 tokens"
    assert losses[-1] < 0.6 * losses[0]
    assert load_config(str(output / "config.yaml")) == config
    left = {"config.yaml", "hf", "loss.png", "metrics.jsonl", "tensorboard"}
    assert {path.name for path in output.iterdir()} == left


def test_epochs_end_a_run_where_the_data_does(parts: TinyParts, tmp_path: Path) -> None:
    run = tiny_run(parts, tmp_path / "run", "train.epochs=2", "train.max_steps=null")
    assert run.schedule.total == 10  # 36 rows in steps of 8: five an epoch


def test_the_earlier_of_two_ends_counts(parts: TinyParts, tmp_path: Path) -> None:
    settings = tiny_settings(parts, tmp_path / "run", "train.epochs=2", "train.max_steps=7")
    assert build_schedule(build_config(settings), steps_per_epoch=5).total == 7
    assert build_schedule(build_config(settings), steps_per_epoch=3).total == 6


def test_metrics_may_be_fewer_than_steps_and_have_the_last(parts: TinyParts, tmp_path: Path) -> None:
    train_model(build_config(tiny_settings(parts, tmp_path / "run", "log.every_steps=4")), console=quiet())
    assert [row["step"] for row in metrics_rows(tmp_path / "run")] == [4, 6]


def test_the_steps_asked_for_are_recorded(parts: TinyParts, tmp_path: Path) -> None:
    train_model(build_config(tiny_settings(parts, tmp_path / "run", "log.profile_steps=[2,3]")), console=quiet())
    (trace,) = (tmp_path / "run" / "profile").iterdir()
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "aten::mm" in names


def test_steps_that_the_run_does_not_have_cannot_be_recorded(parts: TinyParts, tmp_path: Path) -> None:
    config = build_config(tiny_settings(parts, tmp_path / "run", "log.profile_steps=[6,7]"))
    with pytest.raises(ConfigError, match=r"profile_steps = \[6, 7\]: the run has only 6 steps"):
        prepare_alone(config, Registry.discover())


def test_what_is_due() -> None:
    assert [step for step in range(1, 8) if is_due(3, step)] == [3, 6]
    assert not is_due(None, 3)


class NothingLoads(Registry):
    """Fails the test when anything is asked for."""

    def load(self, kind: str, name: str) -> Any:
        raise AssertionError(f"{kind} {name} was loaded")


def test_paths_that_are_not_there_are_all_named_before_anything_is_loaded(parts: TinyParts, tmp_path: Path) -> None:
    changes = ("model.vision=/nowhere/a", "model.language=/nowhere/b", "data.path=/nowhere/c", "data.images=/nowhere/d")
    config = build_config(tiny_settings(parts, tmp_path / "run", *changes, "log.trackers=[tensorboard]"))
    with pytest.raises(ConfigError) as raised:
        prepare_alone(config, NothingLoads.discover())
    named = [line.split(" = ")[0].strip() for line in str(raised.value).splitlines()[1:]]
    assert named == ["model.vision", "model.language", "data.path", "data.images"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["train.trainable=[projector]", "optimizer.part_learning_rates.language=1e-5"], "['language'], frozen by"),
        (["optimizer.part_learning_rates.vision=1e-5"], "['vision'], frozen by"),
        (["optimizer.warmup_fraction=null", "optimizer.warmup_steps=9"], "warmup_steps = 9: the run has only 6 steps"),
        (["train.trainable=[projector]", "model.projector_type=identity"], "identity needs equal widths"),
    ],
)
def test_what_the_run_cannot_honour_is_refused(
    changes: list[str], expected: str, parts: TinyParts, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as raised:
        tiny_run(parts, tmp_path / "run", *changes)
    assert expected in str(raised.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("part", ["vision", "projector"])
def test_a_part_that_the_model_lacks_cannot_be_trained(part: str, parts: TinyParts, tmp_path: Path) -> None:
    changes = ("model.vision=null", "model.language=null", f"model.path={parts.language}", f"train.trainable=[{part}]")
    with pytest.raises(ConfigError, match=f"names \\['{part}'\\], which this model does not have"):
        tiny_run(parts, tmp_path / "run", *changes)


def test_a_tracker_that_does_not_exist_is_refused_first(parts: TinyParts, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="no_such_tracker"):
        tiny_run(parts, tmp_path / "run", "log.trackers=[no_such_tracker]")


def test_an_output_that_is_a_file_is_refused(parts: TinyParts, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ConfigError, match="is not a folder"):
        tiny_run(parts, tmp_path / "run")


@pytest.mark.device
def test_a_text_only_model_trains_on_the_rows_it_can_use(parts: TinyParts, tmp_path: Path) -> None:
    rows = [row for row in json.loads(parts.data.read_text()) if "image" not in row]
    (tmp_path / "text.json").write_text(json.dumps(rows))
    source = ("model.vision=null", "model.language=null", f"model.path={parts.language}")
    changes = (*source, f"data.path={tmp_path / 'text.json'}", "data.images=null", "train.trainable=[language]")
    result = train_model(build_config(tiny_settings(parts, tmp_path / "run", *changes)), console=quiet())
    assert result.exit_code == 0
    assert all(row["image_tokens"] == 0 for row in metrics_rows(tmp_path / "run"))


def step_losses(run: Run, count: int) -> list[float]:
    steps = iter(run.loader)
    return [run.engine.step(next(steps).batches, 1.0).loss for _ in range(count)]


@torch._dynamo.config.patch(recompile_limit=1000)  # beyond it nothing is compiled or counted
@pytest.mark.parametrize("how", ["none", "full"])
def test_compiled_layers_are_not_compiled_anew_for_each_batch(
    how: str, parts: TinyParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = CompileCounter()  # captures graphs and runs them as they are: the C++ compiler would take a minute
    monkeypatch.setattr(recompute, "COMPILER", counter)
    torch._dynamo.reset()
    plain = step_losses(tiny_run(parts, tmp_path / "plain"), 14)
    run = tiny_run(parts, tmp_path / "run", "train.compile=true", f"train.recompute={how}")
    # Once there was a micro-batch of each kind (one sample, equal lengths, different lengths) nothing is new.
    first = step_losses(run, 8)
    graphs = counter.frame_count
    assert graphs > 0
    rest = step_losses(run, 6)
    assert counter.frame_count == graphs, "the lengths of other batches made other graphs"
    # The graphs are run as they are, in fp32; measured 1e-7.
    assert first + rest == pytest.approx(plain, rel=1e-6)
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_training_has_the_same_losses(parts: TinyParts, tmp_path: Path) -> None:
    torch._dynamo.reset()
    plain = step_losses(tiny_run(parts, tmp_path / "plain"), 4)
    compiled = step_losses(tiny_run(parts, tmp_path / "run", "train.compile=true"), 4)
    # fp32 with fused operations: measured 5e-7 / 5.7.
    assert compiled == pytest.approx(plain, rel=1e-6)
    torch._dynamo.reset()
