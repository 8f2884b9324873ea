"""What a run says of its memory at its start and at its end."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from llava_core.config import build_config
from llava_core.plan.of_run import expect, expectation_line, outcome_line
from llava_core.testing.datasets import TinyParts, tiny_parts
from llava_core.train.loop import train_model
from tests.hardware import backend_name, torch_settings_kept
from tests.unit.train.support import tiny_run, tiny_settings


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> TinyParts:
    return tiny_parts(tmp_path_factory.mktemp("parts"))


@pytest.mark.device
def test_a_run_says_what_it_expects_and_what_it_took(parts: TinyParts, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    with torch_settings_kept():
        train_model(build_config(tiny_settings(parts, tmp_path / "run", "train.max_steps=2")), console=console)
    assert isinstance(console.file, io.StringIO)
    lines = [line for line in console.file.getvalue().splitlines() if line.startswith("memory: ")]
    assert "at the peak of a step, of 512 tokens a micro-batch" in lines[0]
    if backend_name() == "cpu":
        assert len(lines) == 1
    else:
        assert len(lines) == 2
        assert "estimated for full micro-batches" in lines[1]


def test_the_outcome_is_that_of_the_steps_of_this_start(parts: TinyParts, tmp_path: Path) -> None:
    run = tiny_run(parts, tmp_path / "run")
    expected = expect(run)
    assert not isinstance(expected, str)
    run.hardware.backend.device_type = "elsewhere"  # type: ignore[misc]
    assert outcome_line(run, expected, 0) is None
    rows = [{"step": 1, "memory": 900}, {"step": 2, "memory": 1}, {"step": 3, "memory": 2}]
    run.config.output.mkdir()
    (run.config.output / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    off = 100 * (expected.peak / 2**21 - 1)
    assert f"2.00 MiB at the peak, {expected.peak / 2**20:.2f} MiB estimated" in str(outcome_line(run, expected, 1))
    assert f"({off:+.1f} %)" in str(outcome_line(run, expected, 1))


def test_what_is_not_estimated_has_its_reason(parts: TinyParts, tmp_path: Path) -> None:
    assert expectation_line("because") == "not estimated: because"
