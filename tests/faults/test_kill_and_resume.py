"""Signals and kills at random times: the same command, given again, ends with the bits of a run left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llava_core.testing.datasets import TinyParts, tiny_parts
from tests.faults.runs import (
    MAIN,
    STEPS,
    Command,
    assert_same_end,
    command,
    exit_code,
    group_is_gone,
    linger,
    wait_for,
    wait_for_step,
)

IN_BACKGROUND = ("checkpoint.every_steps=1", "checkpoint.asynchronous=true")
WATCHDOG_SECONDS = 15
"""Within this, decoding processes notice that the trainer is gone: PyTorch's loader looks every 5 s."""


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> TinyParts:
    return tiny_parts(tmp_path_factory.mktemp("parts"), num_rows=36)


@pytest.fixture(scope="module")
def whole(parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """The run that nobody disturbs."""
    run = command(parts, tmp_path_factory.mktemp("whole") / "run")
    assert exit_code(run.start()) == 0, run.log
    return run


def interrupted(run: Command, send: Callable[[int], None], chance: random.Random) -> int:
    """Starts the run and sends the signal at a random moment, some steps before its end."""
    child = run.start(linger)
    wait_for_step(run, child, chance.randint(0, STEPS - 5))
    time.sleep(chance.uniform(0, 0.08))
    send(child)
    return exit_code(child)


@pytest.mark.parametrize(
    ("number", "code", "seed"),
    [
        pytest.param(signal.SIGTERM, 143, 0, marks=pytest.mark.device),
        (signal.SIGINT, 130, 1),
        pytest.param(signal.SIGTERM, 143, 2, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, 3, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_once_and_the_same_command_goes_on(
    number: signal.Signals, code: int, seed: int, parts: TinyParts, whole: Command, tmp_path: Path
) -> None:
    run, chance = command(parts, tmp_path / "run"), random.Random(seed)
    assert interrupted(run, lambda child: os.kill(child, number), chance) == code, run.log
    assert len(run.checkpoints) == 1
    assert run.checkpoints[0] == f"step-{run.lines():08d}"
    assert "the state is saved" in run.log
    assert not (run.output / "hf").exists()
    assert exit_code(run.start()) == 0, run.log
    assert_same_end(run, whole)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 4))])
def test_a_signal_while_a_save_is_under_way_waits_for_it(
    seed: int, parts: TinyParts, whole: Command, tmp_path: Path
) -> None:
    run, chance = command(parts, tmp_path / "run", *IN_BACKGROUND), random.Random(seed)
    assert interrupted(run, lambda child: os.kill(child, signal.SIGTERM), chance) == 143, run.log
    assert run.checkpoints == [f"step-{step:08d}" for step in range(1, run.lines() + 1)]
    assert exit_code(run.start()) == 0, run.log
    assert_same_end(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_second_signal_changes_nothing(seed: int, parts: TinyParts, whole: Command, tmp_path: Path) -> None:
    run, chance = command(parts, tmp_path / "run"), random.Random(seed)
    first, second = chance.choice([(signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGINT)])

    def send(child: int) -> None:
        os.kill(child, first)
        time.sleep(chance.uniform(0, 0.06))  # in the step, in the save, or in the plot that follows
        os.kill(child, second)

    assert interrupted(run, send, chance) == 128 + first, run.log
    assert len(run.checkpoints) == 1
    assert exit_code(run.start()) == 0, run.log
    assert_same_end(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_leaves_the_workers_to_the_trainer(
    number: signal.Signals, parts: TinyParts, whole: Command, tmp_path: Path
) -> None:
    run = command(parts, tmp_path / "run", "data.num_workers=2")
    child = run.start(linger)
    wait_for_step(run, child, 1)  # of the five of an epoch, at whose end the workers leave by themselves
    os.killpg(child, number)
    assert exit_code(child) == 128 + number, run.log
    assert len(run.checkpoints) == 1
    assert exit_code(run.start()) == 0, run.log
    assert_same_end(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "asynchronous"), [(0, "false"), (2, "false"), (2, "true")])
def test_killed_again_and_again_it_still_ends_bit_equal(
    workers: int, asynchronous: str, parts: TinyParts, whole: Command, tmp_path: Path
) -> None:
    saves = ("checkpoint.every_steps=2", f"checkpoint.asynchronous={asynchronous}")
    run = command(parts, tmp_path / "run", f"data.num_workers={workers}", *saves)
    chance, kills, groups = random.Random(workers), 0, []
    while kills < 5:
        child = run.start(linger)
        groups.append(child)
        # Between the last step seen and some steps on: in a step, a save, a rename, or while resuming.
        seen, ahead = max(run.lines(), 0), chance.randint(0, 2)
        wait_for_step(run, child, min(seen + ahead, STEPS - 1))
        time.sleep(chance.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        assert exit_code(child) == -signal.SIGKILL, run.log
        kills += 1
    assert exit_code(run.start()) == 0, run.log
    assert_same_end(run, whole)
    assert all(name.startswith("step-") and "." not in name for name in run.checkpoints), "litter is swept"
    end = time.monotonic() + WATCHDOG_SECONDS
    while not all(map(group_is_gone, groups)):
        assert time.monotonic() < end, "decoding processes outlived the trainer"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.device
def test_a_killed_worker_ends_the_run_soon_and_the_next_start_goes_on(
    parts: TinyParts, whole: Command, tmp_path: Path
) -> None:
    run = command(parts, tmp_path / "run", "data.num_workers=2", "checkpoint.every_steps=2")
    child = run.start(linger)
    wait_for_step(run, child, 3)
    workers = Path(f"/proc/{child}/task/{child}/children").read_text().split()
    os.kill(int(workers[0]), signal.SIGKILL)
    started = time.monotonic()
    assert exit_code(child) == 1, run.log
    assert time.monotonic() - started < WATCHDOG_SECONDS
    assert "The last checkpoint is intact" in run.log
    assert exit_code(run.start()) == 0, run.log
    assert_same_end(run, whole)


@pytest.mark.slow
def test_the_console_script_has_the_documented_exit_code(parts: TinyParts, whole: Command, tmp_path: Path) -> None:
    run = command(parts, tmp_path / "run")
    script = [sys.executable, "-c", MAIN]
    with subprocess.Popen([*script, *run.arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        wait_for(lambda: run.lines() >= 2, "step 2")
        process.terminate()
        printed, _ = process.communicate()
    assert process.returncode == 143, printed.decode()
    assert exit_code(run.start()) == 0, run.log  # in another process than the first: nothing is left in memory
    assert_same_end(run, whole)
