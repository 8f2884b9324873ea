"""`llava-core train` in several processes: by its own launcher, by torchrun, by srun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from llava_core.errors import BackendUnavailable
from llava_core.launch.start import check_devices
from llava_core.testing.datasets import TinyParts, tiny_parts
from tests.distributed.launching import await_true, free_port
from tests.unit.cli.support import run

TIMEOUT_SECONDS = 300
"""Each process imports PyTorch, on a busy machine for a long time."""

LLAVA_CORE = [sys.executable, "-m", "llava_core"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> TinyParts:
    return tiny_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def config(parts: TinyParts, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(parts.settings(tmp_path / "run")))  # JSON is YAML
    return path


@contextmanager
def started(
    *commands: list[str], environments: tuple[Mapping[str, str], ...] = ({},)
) -> Iterator[list[subprocess.Popen[str]]]:
    """Each command with what its environment has beyond the test's; none outlives the block."""
    processes = [
        subprocess.Popen(
            command, env={**os.environ, **added}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for command, added in zip(commands, environments, strict=True)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit code, and what it printed."""
    printed, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    return process.returncode, printed


def steps(output: Path) -> int:
    path = output / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_signal_saves_and_the_same_command_goes_on_to_the_same_losses(config: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    with started([*LLAVA_CORE, "train", str(config), f"output={whole}"]) as (alone,):
        assert finish(alone)[0] == 0
    command = [*LLAVA_CORE, "train", str(config), f"output={cut}", "--nproc", "2"]
    with started([*command, "checkpoint.every_steps=1", "checkpoint.asynchronous=true"]) as (first,):
        await_true(lambda: steps(cut) >= 2 or first.poll() is not None, "step 2", TIMEOUT_SECONDS)
        first.send_signal(signal.SIGTERM)
        code, printed = finish(first)
    assert code == 143, printed
    assert printed.count("the state is saved") == 1
    with started([*command, "checkpoint.every_steps=1"]) as (second,):
        code, printed = finish(second)
    assert code == 0, printed
    assert (cut / "hf").is_dir()
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-5)  # sums in another order, in fp32


@pytest.mark.slow
def test_torchrun_starts_it(config: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    with started([*torchrun, "-m", "llava_core", "train", str(config)]) as (process,):
        code, printed = finish(process)
    assert code == 0, printed
    assert steps(tmp_path / "run") == 6


@pytest.mark.slow
def test_srun_starts_it(config: Path, tmp_path: Path) -> None:
    """Two tasks with what srun tells them, on loopback."""
    step = {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NODEID": "0",
        "MASTER_PORT": str(free_port()),
    }
    tasks = tuple({**step, "SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in "01")
    command = [*LLAVA_CORE, "train", str(config)]
    with started(command, command, environments=tasks) as processes:
        ends = [finish(process) for process in processes]
    assert [code for code, _ in ends] == [0, 0], ends
    assert steps(tmp_path / "run") == 6


@pytest.mark.slow
def test_what_all_processes_refuse_is_said_once_with_code_2(config: Path) -> None:
    with started([*LLAVA_CORE, "train", str(config), "parallel.tensor=3", "--nproc", "2"]) as (process,):
        code, printed = finish(process)
    assert code == 2, printed
    assert printed.count("error: ") == 1
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--node-rank", "0"], "--node-rank without --nnodes"),
        (["--nnodes", "2", "--node-rank", "0"], "give --master-addr"),
        (["--nproc", "none"], "--nproc none: expected"),
    ],
)
def test_wrong_flags_have_code_2(
    flags: list[str], message: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(capsys, "train", config, *flags)
    assert found.code == 2
    assert message in found.err


def test_a_launched_process_refuses_another_number(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    found = run(capsys, "train", config, "--nproc", "3")
    assert found.code == 2
    assert "--nproc 3" in found.err
    assert "LOCAL_WORLD_SIZE=2" in found.err


def test_more_processes_than_devices_are_refused_with_the_numbers() -> None:
    check_devices("mine", 2, 2)
    with pytest.raises(BackendUnavailable, match="4 processes, and backend 'mine' has 2 device"):
        check_devices("mine", 4, 2)
