"""A run whose length is given in tokens: where it ends, and what its learning rate follows."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from transformers.optimization import _get_cosine_schedule_with_warmup_lr_lambda as transformers_scale

from llava_core.config import build_config
from llava_core.errors import ConfigError
from llava_core.plugins import Registry
from llava_core.testing.datasets import TinyParts
from llava_core.train import loop, report
from llava_core.train.interrupt import StopRequest
from llava_core.train.loop import train_model
from tests.unit.train.support import metrics_rows, quiet, tiny_run, tiny_settings

TOKENS = 10_000
CHANGES = ("train.max_steps=null", f"train.max_tokens={TOKENS}", "optimizer.warmup_fraction=null")


@pytest.fixture(scope="module")
def rows(parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    output = tmp_path_factory.mktemp("tokens") / "run"
    settings = tiny_settings(parts, output, *CHANGES, "optimizer.warmup_tokens=4000", "log.every_steps=1")
    assert train_model(build_config(settings), console=quiet()).exit_code == 0
    return metrics_rows(output)


def test_the_run_ends_with_the_step_that_reaches_them(rows: list[dict[str, float]]) -> None:
    trained_on = [row["text_tokens"] + row["image_tokens"] for row in rows]
    assert [row["tokens"] for row in rows] == [sum(trained_on[: n + 1]) for n in range(len(rows))]
    assert rows[-2]["tokens"] < TOKENS <= rows[-1]["tokens"]


def test_each_step_has_transformers_rate_of_the_tokens_before_it(rows: list[dict[str, float]]) -> None:
    before = [0, *(row["tokens"] for row in rows[:-1])]
    expected = [
        1e-3 * transformers_scale(int(tokens), num_warmup_steps=4000, num_training_steps=TOKENS, num_cycles=0.5)
        for tokens in before
    ]
    assert sum(tokens < 4000 for tokens in before) > 1, "a warm-up of more than its first step"
    assert [row["lr"] for row in rows] == pytest.approx(expected, rel=1e-14, abs=1e-18)  # the same formula


def test_a_warmup_fraction_is_of_the_tokens(parts: TinyParts, tmp_path: Path) -> None:
    run = tiny_run(parts, tmp_path / "run", *CHANGES, "optimizer.warmup_fraction=0.03")
    assert (run.schedule.unit, run.schedule.total, run.schedule.warmup) == ("tokens", TOKENS, 300)


def test_a_warmup_beyond_the_run_is_refused(parts: TinyParts, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="warmup_tokens = 10001: the run has only 10000 tokens"):
        tiny_run(parts, tmp_path / "run", *CHANGES, "optimizer.warmup_tokens=10001")


def test_a_finished_run_is_not_trained_again(parts: TinyParts, tmp_path: Path) -> None:
    config = build_config(tiny_settings(parts, tmp_path / "run", *CHANGES, "checkpoint.every_steps=100"))
    first = train_model(config, console=quiet())
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert train_model(config, console=quiet()) == first
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_steps_to_record_that_the_run_did_not_reach_are_told(parts: TinyParts, tmp_path: Path) -> None:
    settings = tiny_settings(parts, tmp_path / "run", *CHANGES, "train.max_tokens=2000", "log.profile_steps=[2,3]")
    to = Console(file=io.StringIO(), width=200)
    train_model(build_config(settings), console=to)
    assert isinstance(to.file, io.StringIO)
    assert "log.profile_steps = [2, 3]: the run had only 2 steps" in to.file.getvalue()


def test_what_is_shown_counts_tokens(parts: TinyParts, tmp_path: Path) -> None:
    to = Console(file=io.StringIO(), width=200)
    run = tiny_run(parts, tmp_path / "run", *CHANGES)
    report.print_summary(run, to)
    loop.run_steps(run, 0, StopRequest(), Registry.discover(), to)
    assert isinstance(to.file, io.StringIO)
    shown = to.file.getvalue()
    assert "10,000 tokens in steps of 8 samples, from 36 rows" in shown
    last = [line for line in shown.splitlines() if line.startswith("run: step")][-1]
    reached = metrics_rows(tmp_path / "run")[-1]
    assert last.startswith(f"run: step {reached['step']}, {reached['tokens']:,}/10,000 tokens  loss")
