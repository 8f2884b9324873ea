"""Checkpoints that several processes save together, of which one is killed or fails."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import distributed

from llava_core.engine.parts import Part
from llava_core.engine.processes import Processes
from llava_core.errors import CheckpointError
from llava_core.train.checkpoint import open_newest, save_state
from llava_core.train.stored import Checkpoint
from tests.distributed.processes import run_processes

KEEP = 2
SIZE = 2


def this_process() -> Processes:
    rank, size = distributed.get_rank(), distributed.get_world_size()
    return Processes(rank, size, rank, size)


def save(root: Path, step: int) -> Path:
    """Each process has a row of the weight, all have the count; every value tells the step."""
    process = this_process()
    parts = {
        "weight": Part(torch.full((1, 100), step / 7), (process.rank, 0), (SIZE, 100)),
        "count": Part(torch.tensor(step), (), ()),
    }
    return save_state(root, step, parts, {"step": step}, keep=KEEP, processes=process)


def assert_holds(checkpoint: Checkpoint | None, step: int) -> None:
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.state) == (step, {"step": step})
    assert torch.equal(checkpoint.read("weight"), torch.full((SIZE, 100), step / 7))
    assert checkpoint.read("count") == step


def names(root: Path) -> list[str]:
    return sorted(os.listdir(root))


def save_steps(root: Path, *steps: int) -> None:
    for step in steps:
        save(root, step)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Steps 1 and 2, both saved by two processes."""
    run_processes(SIZE, save_steps, tmp_path / "root", 1, 2)
    return tmp_path / "root"


# ---- kills


def killed_before(operation: int) -> None:
    """Make this process kill itself just before its n-th change to names or call to fsync."""
    remaining = operation

    def guard(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal remaining
            remaining -= 1
            if remaining < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "rename", "mkdir", "unlink", "rmdir"):
        setattr(os, name, guard(getattr(os, name)))


def save_until_killed(root: Path, victim: int, operation: int) -> None:
    if distributed.get_rank() == victim:
        killed_before(operation)
    save(root, 3)


def failure_of(size: int, work: Callable[..., object], *arguments: object) -> str:
    """How the processes failed; nothing if they did not."""
    try:
        run_processes(size, work, *arguments)
    except AssertionError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("victim", range(SIZE))
def test_kill_of_one_before_every_operation(victim: int, root: Path, tmp_path: Path) -> None:
    """The others end with an error; the newest is the one before or the new one, whole; the next save sweeps."""
    newest = set()
    for operation in range(50):
        copied = Path(shutil.copytree(root, tmp_path / "copy"))
        message = failure_of(SIZE, save_until_killed, copied, victim, operation)
        assert not message or f"process {victim}:\nit ended without an answer" in message
        checkpoint, skipped = open_newest(copied)
        assert skipped == []
        assert checkpoint is not None
        assert checkpoint.step in (2, 3)
        assert_holds(checkpoint, checkpoint.step)
        newest.add(checkpoint.step)
        run_processes(SIZE, save_steps, copied, 4)
        assert not [name for name in names(copied) if "." in name]
        shutil.rmtree(copied)
        if not message:
            break
    assert not message
    # Each process writes one file; all else is the first one's.
    assert operation == 1 if victim else operation > 10
    assert newest == {2, 3}


# ---- failures


def save_with_little_room(root: Path, victim: int, limit: int) -> str:
    """A limit on this process's files cuts a write off as a full disk does, after as many bytes."""
    if distributed.get_rank() == victim:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        with pytest.raises(CheckpointError) as caught:
            save(root, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return str(caught.value)


@pytest.mark.parametrize("limit", [0, 100, 300])
@pytest.mark.parametrize("victim", range(SIZE))
def test_no_room_for_one_is_an_error_in_all(victim: int, limit: int, root: Path) -> None:
    messages = run_processes(SIZE, save_with_little_room, root, victim, limit)
    assert len(set(messages)) == 1
    assert f"process {victim}: step 3 could not be saved; older checkpoints are untouched" in messages[0]
    assert "File too large" in messages[0]
    assert names(root) == ["step-00000001", "step-00000002"]
    assert_holds(open_newest(root)[0], 2)
    run_processes(SIZE, save_steps, root, 3)
    assert_holds(open_newest(root)[0], 3)


def save_where_one_sees_no_folder(root: Path, elsewhere: Path) -> str:
    """As with an output folder on a disk of the machine's own."""
    with pytest.raises(CheckpointError) as caught:
        save(root if distributed.get_rank() == 0 else elsewhere, 3)
    return str(caught.value)


def test_a_folder_that_is_not_shared_is_an_error_in_all(root: Path, tmp_path: Path) -> None:
    for message in run_processes(SIZE, save_where_one_sees_no_folder, root, tmp_path / "elsewhere"):
        assert "process 1: step 3 could not be saved" in message
        assert "No such file or directory" in message
    assert names(root) == ["step-00000001", "step-00000002"]


def save_again(root: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        save(root, 2)
    return str(caught.value)


def test_a_sound_checkpoint_is_overwritten_by_none(root: Path) -> None:
    assert all("is never overwritten" in message for message in run_processes(SIZE, save_again, root))
    assert_holds(open_newest(root)[0], 2)


def opened_step(root: Path) -> tuple[int, list[str]]:
    checkpoint, skipped = open_newest(root, this_process())
    assert checkpoint is not None
    assert_holds(checkpoint, checkpoint.step)
    return checkpoint.step, [reason for _, reason in skipped]


def test_all_processes_take_the_same_checkpoint(root: Path) -> None:
    file = root / "step-00000002" / "tensors-00001-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    for step, reasons in run_processes(SIZE, opened_step, root):
        assert step == 1
        assert [f"process 1: {file} is damaged" in reason for reason in reasons] == [True]
