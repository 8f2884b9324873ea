"""What a run reports: strict JSON lines that survive a crash, TensorBoard files, a picture."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llava_core.testing.datasets import TinyParts
from llava_core.train.metrics import MetricsLog, StepMetrics, read_metrics
from llava_core.train.plots import plot_loss, smooth
from llava_core.train.trackers import TensorboardTracker
from tests.unit.train.support import run_to_end, tiny_run

XTUNER_KEYS = {"lr", "data_time", "loss", "time", "tflops", "tokens_per_sec", "iter", "memory", "step"}
OWN_KEYS = {
    "tokens",
    "grad_norm",
    "text_tokens_per_sec",
    "text_tokens",
    "image_tokens",
    "label_tokens",
    "pad_tokens",
    "samples",
    "overlong",
    "epoch",
    "mfu",
    "skipped",
}
STEPS = 6


def a_step(number: int) -> StepMetrics:
    values = {f.name: 1.5 if f.type == "float" else 1 for f in fields(StepMetrics)}
    return replace(StepMetrics(**values), step=number, iter=number)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def output(parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("metrics") / "run"
    run = tiny_run(parts, folder, f"train.max_steps={STEPS}", "log.trackers=[tensorboard]")
    run_to_end(run)
    return folder


def test_each_step_has_one_line_with_every_key(output: Path) -> None:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [row["iter"] for row in rows] == [*range(1, STEPS + 1)]
    assert all(row.keys() == XTUNER_KEYS | OWN_KEYS for row in rows)


def test_the_numbers_fit_together(output: Path) -> None:
    for row in read_metrics(output):
        tokens = row["text_tokens"] + row["image_tokens"]
        assert row["tokens_per_sec"] * row["time"] == pytest.approx(tokens)
        assert row["text_tokens_per_sec"] * row["time"] == pytest.approx(row["text_tokens"])
        assert 0 < row["label_tokens"] < row["text_tokens"]
        assert 0 <= row["data_time"] < row["time"]
        assert row["tflops"] > 0
        assert row["memory"] > 0
    assert [row["epoch"] for row in read_metrics(output)] == pytest.approx(
        [8 / 36, 16 / 36, 24 / 36, 32 / 36, 1, 44 / 36]
    )


def test_tensorboard_has_the_same_numbers(output: Path) -> None:
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    rows = read_metrics(output)
    for key in ("loss", "lr", "grad_norm"):
        scalars = events.Scalars(f"train/{key}")
        assert [event.step for event in scalars] == [row["step"] for row in rows]
        assert [event.value for event in scalars] == pytest.approx([row[key] for row in rows], rel=1e-6)  # fp32 on disk


def test_tensorboard_shows_a_step_that_was_taken_again_once(tmp_path: Path) -> None:
    for start, end, loss in [(1, 5, 2.0), (3, 6, 1.0)]:  # the second run resumes after step 2
        tracker = TensorboardTracker(tmp_path)
        for step in range(start, end + 1):
            tracker.log(step, {"loss": loss})
        tracker.close()
        time.sleep(1.1)  # event files are ordered by the second in their names
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(1, 2.0), (2, 2.0), (3, 1.0), (4, 1.0), (5, 1.0), (6, 1.0)]


def test_the_picture_is_a_png(output: Path) -> None:
    with Image.open(plot_loss(output)) as picture:
        assert picture.format == "PNG"
        assert picture.size[0] > 400


def test_a_run_that_was_stopped_before_its_first_step_has_a_picture_too(tmp_path: Path) -> None:
    assert plot_loss(tmp_path).is_file()


def test_the_smoothed_curve_starts_at_the_first_value() -> None:
    assert smooth([5.0, 5.0, 5.0]) == pytest.approx([5.0, 5.0, 5.0])
    # By hand: (0.9 · 0.1 · 1 + 0.1 · 3) / (1 − 0.9²)
    assert smooth([1.0, 3.0])[1] == pytest.approx(0.39 / 0.19)


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.log(replace(a_step(1), grad_norm=float("inf"), skipped=True))
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["grad_norm"] is None


def test_lines_beyond_the_resumed_step_are_taken_off(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for number in (1, 2, 3):
        log.log(a_step(number))
    log.close()
    again = MetricsLog(tmp_path, 2)
    again.log(a_step(3))
    again.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path: Path) -> None:
    MetricsLog(tmp_path, 0).log(a_step(1))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    log = MetricsLog(tmp_path, 1)
    log.log(a_step(2))
    log.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_a_full_disk_at_the_start_loses_no_line(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for number in range(1, 21):
        log.log(a_step(number))
    log.close()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # less than the lines take
        try:
            MetricsLog(tmp_path, 15)
        except OSError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
