"""Faults of data, numbers and disks during training: a named error, an exit code, and what was saved stays sound."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from llava_core.testing.datasets import TinyParts, tiny_parts
from llava_core.train.checkpoint import open_newest
from tests.faults.runs import STEPS, Command, assert_same_end, command, exit_code, linger, wait_for, wait_for_step

CONFIG_ERROR, RUN_ERROR = 2, 1


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> TinyParts:
    return tiny_parts(tmp_path_factory.mktemp("parts"), num_rows=36)


@pytest.mark.device
@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_run_that_diverges_stops_before_it_spoils_a_checkpoint(
    asynchronous: str, parts: TinyParts, tmp_path: Path
) -> None:
    saves = ("checkpoint.every_steps=1", f"checkpoint.asynchronous={asynchronous}")
    changes = ("optimizer.learning_rate=1e30", "optimizer.warmup_fraction=null")
    run = command(parts, tmp_path / "run", *changes, *saves)
    assert exit_code(run.start()) == RUN_ERROR
    assert "the weights are intact" in run.log
    assert "Lower the learning rate" in run.log
    newest, skipped = open_newest(run.output / "checkpoints")
    assert newest is not None
    assert skipped == []
    assert newest.step == run.lines() > 0
    weights = [newest.read(name) for name in newest.tensors if name.startswith("model.")]
    assert all(tensor.isfinite().all() for tensor in weights)


def test_a_nan_in_the_weights_file_stops_at_the_first_step(parts: TinyParts, tmp_path: Path) -> None:
    language = Path(shutil.copytree(parts.language, tmp_path / "language"))
    weights = load_file(language / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, language / "model.safetensors", metadata={"format": "pt"})
    run = command(parts, tmp_path / "run", f"model.language={language}", "checkpoint.every_steps=1")
    assert exit_code(run.start()) == RUN_ERROR
    assert "Samples whose hidden states are not finite: row" in " ".join(run.log.split())
    assert run.checkpoints == []


def test_too_many_bad_rows_stop_the_run_and_are_listed(parts: TinyParts, tmp_path: Path) -> None:
    images = Path(shutil.copytree(parts.images, tmp_path / "images"))
    for path in sorted(images.iterdir())[::2]:
        path.unlink()
    run = command(parts, tmp_path / "run", f"data.images={images}")
    assert exit_code(run.start()) == RUN_ERROR
    assert "missing_image" in run.log
    listed = [json.loads(line) for line in (run.output / "quarantine.jsonl").read_text().splitlines()]
    assert len(listed) >= 10
    assert all(row["id"].startswith("row") and row["reason"] == "missing_image" for row in listed)


@pytest.mark.slow
def test_a_few_bad_rows_are_left_out_and_resuming_is_exact(parts: TinyParts, tmp_path: Path) -> None:
    images = Path(shutil.copytree(parts.images, tmp_path / "images"))
    for row in (3, 11, 30):
        (images / f"{row}.png").write_bytes(b"no picture")
    changes = (f"data.images={images}", "data.max_bad_fraction=0.2")
    whole = command(parts, tmp_path / "whole", *changes)
    assert exit_code(whole.start()) == 0, whole.log
    run = command(parts, tmp_path / "run", *changes)
    child = run.start(linger)
    wait_for_step(run, child, 6)
    os.kill(child, signal.SIGTERM)
    assert exit_code(child) == 143, run.log
    assert exit_code(run.start()) == 0, run.log
    assert_same_end(run, whole)
    for folder in (run.output, whole.output):
        lines = (folder / "quarantine.jsonl").read_text().splitlines()
        assert sorted(json.loads(line)["id"] for line in lines) == ["row11", "row3", "row30"]


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_full_disk_while_saving_keeps_the_checkpoint_before(
    asynchronous: str, parts: TinyParts, tmp_path: Path
) -> None:
    whole = command(parts, tmp_path / "whole")
    assert exit_code(whole.start()) == 0, whole.log
    saves = ("checkpoint.every_steps=3", f"checkpoint.asynchronous={asynchronous}")
    run = command(parts, tmp_path / "run", *saves)
    child = run.start(linger)
    wait_for(lambda: bool(run.complete_checkpoints), "first checkpoint")
    os.kill(child, signal.SIGKILL)
    exit_code(child)
    before = run.complete_checkpoints

    def shrink_the_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # the tensors take over a megabyte

    assert exit_code(run.start(shrink_the_disk)) == RUN_ERROR, run.log
    assert "could not be saved; older checkpoints are untouched" in " ".join(run.log.split())
    assert run.complete_checkpoints == before
    assert exit_code(run.start()) == 0, run.log
    assert_same_end(run, whole)


@pytest.mark.slow
def test_a_checkpoint_damaged_between_two_runs_is_skipped_aloud(parts: TinyParts, tmp_path: Path) -> None:
    run = command(parts, tmp_path / "run", "checkpoint.every_steps=4")
    assert exit_code(run.start()) == 0, run.log
    whole = Command(run.config, Path(shutil.copytree(run.output, tmp_path / "whole")), run.overrides)
    newest = run.output / "checkpoints" / run.checkpoints[-1]
    data = bytearray((newest / "state.json").read_bytes())
    data[len(data) // 2] ^= 4
    (newest / "state.json").write_bytes(data)
    assert exit_code(run.start()) == 0, run.log
    told = " ".join(run.log.split())
    assert "skipped a damaged checkpoint" in told
    assert f"resumed after step {STEPS - 4}" in told
    assert_same_end(run, whole)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optimizer.learning_rat=1", "Did you mean 'optimizer.learning_rate'"),
        ("data.path=/nowhere", "data.path = /nowhere: no such file or folder"),
        ("backend.name=no_such_backend", "no_such_backend"),
        ("train.trainable=[projector,head]", "train.trainable.1 = 'head'"),
    ],
)
def test_a_request_that_cannot_be_honoured_has_its_own_exit_code(
    override: str, told: str, parts: TinyParts, tmp_path: Path
) -> None:
    run = command(parts, tmp_path / "run", override)
    assert exit_code(run.start()) == CONFIG_ERROR, run.log
    assert told in run.log
    assert "Traceback" not in run.log
    assert not run.output.exists()
