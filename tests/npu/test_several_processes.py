"""Two processes on two NPUs: HCCL, sharded weights, and the numbers of one process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llava_core.testing.datasets import TinyParts, tiny_parts
from tests.forked_command import run_forked

pytestmark = pytest.mark.npu

TOLERANCE = 2e-6
"""Relative, in fp32: the same sums in another order, over six steps. Measured 4e-7."""

STOPPED = 3
SAVES = (f"checkpoint.every_steps={STOPPED}", "checkpoint.keep=null", "checkpoint.asynchronous=true")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> TinyParts:
    return tiny_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def alone(parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(parts, tmp_path_factory.mktemp("alone") / "run")


@pytest.fixture(scope="module")
def spread(parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sharded over two NPUs, and saved; started as a user starts it."""
    output = tmp_path_factory.mktemp("spread") / "run"
    command = [sys.executable, "-m", "llava_core", "train", settings(parts, output), *SAVES]
    done = subprocess.run(
        [*command, "--backend", "npu", "--nproc", "2"], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return output


@pytest.fixture(autouse=True)
def two_devices(device: torch.device) -> None:
    if torch.npu.device_count() < 2:
        pytest.skip("two processes need two devices")


def settings(parts: TinyParts, output: Path) -> str:
    """A config's file."""
    config = output.with_suffix(".yaml")
    config.write_text(json.dumps(parts.settings(output)))  # JSON is YAML
    return str(config)


def train(parts: TinyParts, output: Path, *arguments: str, nproc: int = 1, backend: str = "npu") -> Path:
    """The folder of `llava-core train`, and beside it what was printed."""
    command = ["train", settings(parts, output), "--backend", backend, *arguments]
    run_forked(command, output.with_suffix(".log"), nproc=nproc)
    return output


def assert_same_numbers(found: Path, expected: Path) -> None:
    for key in ("step", "loss", "grad_norm"):
        assert column(found, key) == pytest.approx(column(expected, key), rel=TOLERANCE)


def column(output: Path, key: str) -> list[float]:
    """What each step's line of metrics says."""
    return [json.loads(line)[key] for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_have_the_numbers_of_one(spread: Path, alone: Path) -> None:
    assert_same_numbers(spread, alone)


@pytest.mark.parametrize("layout", ["parallel.tensor=2", "parallel.context=2", "parallel.pipeline=2"])
def test_so_they_have_where_they_share_more(layout: str, alone: Path, parts: TinyParts, tmp_path: Path) -> None:
    assert_same_numbers(train(parts, tmp_path / "run", layout, nproc=2), alone)


@pytest.mark.parametrize("layout", ["parallel.tensor=2", "parallel.pipeline=2"])
def test_so_they_have_where_the_host_keeps_everything(
    layout: str, alone: Path, parts: TinyParts, tmp_path: Path
) -> None:
    kept = ("parallel.offload=true", "train.offload_activations=true", "train.recompute=selective")
    assert_same_numbers(train(parts, tmp_path / "run", layout, *kept, nproc=2), alone)


def test_weights_on_the_host_change_no_bit(spread: Path, parts: TinyParts, tmp_path: Path) -> None:
    found = train(parts, tmp_path / "run", "parallel.offload=true", nproc=2)
    for key in ("loss", "grad_norm"):
        assert column(found, key) == column(spread, key)
    (exported,), (expected,) = ((run / "hf").glob("*.safetensors") for run in (found, spread))
    assert exported.read_bytes() == expected.read_bytes()


def goes_on(parts: TinyParts, whole: Path, output: Path, *, nproc: int = 1, backend: str = "npu") -> Path:
    """A run that was stopped where `whole` had saved, and given another command."""
    name = f"checkpoints/step-{STOPPED:08d}"
    shutil.copytree(whole / name, output / name)
    shutil.copy(whole / "metrics.jsonl", output)
    train(parts, output, nproc=nproc, backend=backend)
    assert f"resumed after step {STOPPED}" in output.with_suffix(".log").read_text()
    assert column(output, "loss")[:STOPPED] == column(whole, "loss")[:STOPPED]
    return output


def test_one_host_goes_on_from_two_npus(spread: Path, alone: Path, parts: TinyParts, tmp_path: Path) -> None:
    assert_same_numbers(goes_on(parts, spread, tmp_path / "run", backend="cpu"), alone)


def test_two_npus_go_on_from_one_host(alone: Path, parts: TinyParts, tmp_path: Path) -> None:
    whole = train(parts, tmp_path / "whole", *SAVES, backend="cpu")
    assert_same_numbers(goes_on(parts, whole, tmp_path / "run", nproc=2), alone)
