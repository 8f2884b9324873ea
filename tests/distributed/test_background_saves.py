"""Several processes save in the background, over a channel of their own, while they train together."""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from torch import distributed

from llava_core.config import build_config
from llava_core.engine.processes import Processes
from llava_core.errors import CheckpointError
from llava_core.plugins import Registry
from llava_core.testing.datasets import TinyParts, tiny_parts
from llava_core.train import loop, resume, saver
from llava_core.train.checkpoint import Draft, open_newest, write_draft
from llava_core.train.interrupt import StopRequest
from llava_core.train.prepare import Run, open_run, prepare
from tests.distributed.processes import TIMEOUT_SECONDS, run_processes
from tests.unit.train.support import before_step, checkpoint_files, tiny_settings

STEPS, EVERY = 6, 2
WAITING = "checkpoint.asynchronous=false"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> TinyParts:
    return tiny_parts(tmp_path_factory.mktemp("parts"))


def settings(parts: TinyParts, output: Path, *changes: str) -> dict[str, Any]:
    saves = (f"checkpoint.every_steps={EVERY}", "checkpoint.keep=null", "checkpoint.asynchronous=true")
    return tiny_settings(parts, output, f"train.max_steps={STEPS}", *saves, *changes)


def train(settings: dict[str, Any], disturb: Callable[[Run], None] = lambda run: None) -> str:
    """Train to the end, from where a run stopped. The CheckpointError that ended it, if one did."""
    rank, size = distributed.get_rank(), distributed.get_world_size()
    config, processes, registry = build_config(settings), Processes(rank, size, rank, size), Registry.discover()
    run = prepare(config, registry, open_run(config, registry, processes), processes)
    disturb(run)
    done, _ = resume.resume(run)
    try:
        loop.run_steps(run, done, StopRequest(), registry, Console(quiet=True))
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def whole(parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The checkpoints of two processes that nobody disturbs, and that wait for each save."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert run_processes(2, train, settings(parts, output, WAITING)) == ["", ""]
    files = checkpoint_files(output)
    assert len(files) == STEPS // EVERY * 4  # each process's tensors, state, manifest
    return files


def test_the_files_are_those_of_saves_that_wait(parts: TinyParts, whole: dict[str, bytes], tmp_path: Path) -> None:
    assert run_processes(2, train, settings(parts, tmp_path / "run")) == ["", ""]
    assert checkpoint_files(tmp_path / "run") == whole


@pytest.mark.parametrize("layout", [("parallel.tensor=2",), ("parallel.context=2",)], ids=["tensor", "context"])
def test_so_they_are_under_other_layouts(layout: tuple[str, ...], parts: TinyParts, tmp_path: Path) -> None:
    for name, changes in (("waiting", (WAITING,)), ("background", ())):
        assert run_processes(2, train, settings(parts, tmp_path / name, *layout, *changes)) == ["", ""]
    assert checkpoint_files(tmp_path / "background") == checkpoint_files(tmp_path / "waiting")


def write_once_two_steps_are_done(run: Run) -> None:
    """Of the second process: the first one's thread waits for it meanwhile, and both train on."""
    if run.processes.is_first:
        return
    goes_on = threading.Event()

    def late(root: Path, draft: Draft, processes: Processes) -> Path:
        assert goes_on.wait(TIMEOUT_SECONDS), "training did not go on"
        return write_draft(root, draft, processes)

    saver.write_draft = late  # type: ignore[assignment]
    before_step(run, lambda step: goes_on.set() if step == 2 * EVERY else None)


def test_all_train_on_while_one_still_has_to_write(parts: TinyParts, whole: dict[str, bytes], tmp_path: Path) -> None:
    assert run_processes(2, train, settings(parts, tmp_path / "run"), write_once_two_steps_are_done) == ["", ""]
    assert checkpoint_files(tmp_path / "run") == whole


def shrink_the_second_disk(run: Run) -> None:
    """Before the second save."""

    def write(root: Path, draft: Draft, processes: Processes) -> Path:
        if draft.step == 2 * EVERY:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        return write_draft(root, draft, processes)

    if not run.processes.is_first:
        saver.write_draft = write  # type: ignore[assignment]


def test_no_room_for_one_ends_all_with_its_reason(parts: TinyParts, whole: dict[str, bytes], tmp_path: Path) -> None:
    output = tmp_path / "run"
    first, second = run_processes(2, train, settings(parts, output), shrink_the_second_disk)
    assert first == second
    assert "process 1: step 4 could not be saved; older checkpoints are untouched" in first
    assert "File too large" in first
    assert checkpoint_files(output) == only_first(whole)


def only_first(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name.startswith(f"step-{EVERY:08d}/")}


def kill_in_second_save(rank: int, operation: str) -> Callable[[Run], None]:
    """Makes one process kill itself at this change to the disk by the thread that saves step 4."""

    def disturb(run: Run) -> None:
        real = getattr(os, operation)

        def guarded(*arguments: Any, **options: Any) -> Any:
            if threading.current_thread().name == f"save-{2 * EVERY}":
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        if run.processes.rank == rank:
            setattr(os, operation, guarded)

    return disturb


@pytest.mark.parametrize(("rank", "operation"), [(0, "mkdir"), (1, "fsync"), (0, "rename")])
def test_a_kill_leaves_the_checkpoint_before_and_the_next_start_goes_on(
    rank: int, operation: str, parts: TinyParts, whole: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    with pytest.raises(AssertionError, match=f"process {rank}:\nit ended without an answer"):
        run_processes(2, train, settings(parts, output), kill_in_second_save(rank, operation))
    newest, skipped = open_newest(output / "checkpoints")
    assert newest is not None
    assert (newest.step, skipped) == (EVERY, [])
    assert run_processes(2, train, settings(parts, output)) == ["", ""]
    assert checkpoint_files(output) == whole
