"""Saves in the background: the files of a save that waits, training that goes on, and no error lost."""

from __future__ import annotations

import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_core.errors import CheckpointError, TrainingError
from llava_core.testing.datasets import TinyParts
from llava_core.train import saver
from llava_core.train.checkpoint import Draft, open_newest, write_draft
from llava_core.train.interrupt import StopRequest
from llava_core.train.prepare import Run
from llava_core.train.saver import host_copies
from tests.hardware import hardware
from tests.unit.train.support import before_step, checkpoint_files, run_to_end, tiny_run

STEPS = 6
WAIT_SECONDS = 60
"""Until something that never comes is a failure."""


def saving_run(parts: TinyParts, output: Path, every: int, *changes: str) -> Run:
    every_step = (f"train.max_steps={STEPS}", f"checkpoint.every_steps={every}", "checkpoint.keep=null")
    return tiny_run(parts, output, *every_step, "checkpoint.asynchronous=true", *changes)


def join_saves() -> None:
    """Wait until no thread saves."""
    for thread in threading.enumerate():
        if thread.name.startswith("save-"):
            thread.join(WAIT_SECONDS)
            assert not thread.is_alive()


class Gate:
    """Holds each save in its thread until it is let through; notes when saves begin and end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.events: list[tuple[str, int]] = []
        monkeypatch.setattr(saver, "write_draft", self._write)

    def _write(self, root: Path, draft: Draft, processes: Any) -> Path:
        self.events.append(("begin", draft.step))
        assert self.open.wait(WAIT_SECONDS), "nobody opened the gate"
        path = write_draft(root, draft, processes)
        self.events.append(("end", draft.step))
        return path


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


@pytest.mark.device
def test_the_files_are_those_of_a_save_that_waits(parts: TinyParts, tmp_path: Path) -> None:
    waiting = saving_run(parts, tmp_path / "waiting", 1, "checkpoint.asynchronous=false")
    assert run_to_end(waiting) == run_to_end(saving_run(parts, tmp_path / "background", 1))
    found, expected = checkpoint_files(tmp_path / "background"), checkpoint_files(tmp_path / "waiting")
    assert len(expected) == STEPS * 3  # tensors, state, manifest
    assert found == expected


@pytest.mark.device
def test_training_goes_on_while_a_save_is_held_and_changes_nothing_in_it(
    parts: TinyParts, tmp_path: Path, gate: Gate
) -> None:
    run_to_end(saving_run(parts, tmp_path / "waiting", 2, "checkpoint.asynchronous=false"))
    run = saving_run(parts, tmp_path / "background", 2)
    began: list[list[tuple[str, int]]] = []

    def act(step: int) -> None:
        if step == 4:  # the save after step 2 has been held for a whole step
            began.append(list(gate.events))
            gate.open.set()

    before_step(run, act)
    run_to_end(run)
    assert began == [[("begin", 2)]]
    assert checkpoint_files(tmp_path / "background") == checkpoint_files(tmp_path / "waiting")


def test_one_save_is_under_way_at_a_time(parts: TinyParts, tmp_path: Path, gate: Gate) -> None:
    run = saving_run(parts, tmp_path / "run", 1)
    before_step(run, lambda step: gate.open.set() if step == 2 else None)
    run_to_end(run)
    assert gate.events == [(what, step) for step in range(1, STEPS + 1) for what in ("begin", "end")]


def no_room(output: Path) -> None:
    """Where the checkpoints would lie there is a file."""
    output.mkdir()
    (output / "checkpoints").touch()


def test_a_save_that_failed_ends_the_run_at_the_next_step(parts: TinyParts, tmp_path: Path, gate: Gate) -> None:
    run, steps = saving_run(parts, tmp_path / "run", 2), []
    no_room(tmp_path / "run")

    def act(step: int) -> None:
        steps.append(step)
        if step == 3:
            gate.open.set()
            join_saves()

    before_step(run, act)
    with pytest.raises(CheckpointError, match="step 2 could not be saved.*File exists"):
        run_to_end(run)
    assert steps == [1, 2, 3]


def test_the_next_save_raises_what_the_one_before_did(parts: TinyParts, tmp_path: Path, gate: Gate) -> None:
    run, steps = saving_run(parts, tmp_path / "run", 2), []
    no_room(tmp_path / "run")

    def act(step: int) -> None:
        steps.append(step)
        if step == 4:
            gate.open.set()

    before_step(run, act)
    with pytest.raises(CheckpointError, match="step 2 could not be saved"):
        run_to_end(run)
    assert steps == [1, 2, 3, 4]


def test_the_end_of_the_run_raises_what_the_last_save_did(parts: TinyParts, tmp_path: Path) -> None:
    no_room(tmp_path / "run")
    with pytest.raises(CheckpointError, match=f"step {STEPS} could not be saved"):
        run_to_end(saving_run(parts, tmp_path / "run", STEPS))


def fail(gate: Gate, step: int) -> None:
    """In the step after the first save, which is then let through."""
    if step == 3:
        gate.open.set()
        raise TrainingError("of its own")


def test_an_error_lets_a_save_come_to_its_end(parts: TinyParts, tmp_path: Path, gate: Gate) -> None:
    run = saving_run(parts, tmp_path / "run", 2)
    before_step(run, partial(fail, gate))
    with pytest.raises(TrainingError, match="of its own"):
        run_to_end(run)
    newest, skipped = open_newest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert (newest.step, skipped) == (2, [])


def test_a_save_that_fails_beside_an_error_is_a_warning(parts: TinyParts, tmp_path: Path, gate: Gate) -> None:
    run = saving_run(parts, tmp_path / "run", 2)
    no_room(tmp_path / "run")
    before_step(run, partial(fail, gate))
    with (
        pytest.raises(TrainingError, match="of its own"),
        pytest.warns(UserWarning, match="a save was under way, and failed: step 2 could not be saved"),
    ):
        run_to_end(run)


@pytest.mark.parametrize("every", [2, 3], ids=["also of this step", "of an earlier step"])
def test_a_stop_waits_for_the_save_under_way(every: int, parts: TinyParts, tmp_path: Path, gate: Gate) -> None:
    run, stop = saving_run(parts, tmp_path / "run", every), StopRequest()

    def act(step: int) -> None:
        if step == 4:
            gate.open.set()
            stop.signal = signal.SIGTERM

    before_step(run, act)
    assert len(run_to_end(run, stop)) == 4
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        f"step-{step:08d}" for step in (every, 4)
    ]


@pytest.mark.device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8], ids=str)
def test_copies_are_of_the_host_and_share_nothing(dtype: torch.dtype) -> None:
    matrix = torch.randint(0, 256, (4, 6 * dtype.itemsize), dtype=torch.uint8).view(dtype)
    there = matrix.to(hardware().device, copy=True)
    views = {"matrix": there, "transposed": there.t(), "column": there[:, 2], "row": there[:1].expand(3, -1)}
    expected = {name: view.cpu().clone() for name, view in views.items()}
    copies = host_copies(views, hardware().backend.synchronize)
    there.zero_()
    hardware().backend.synchronize()
    assert {copy.device.type for copy in copies.values()} == {"cpu"}
    for name, tensor in expected.items():
        assert torch.equal(copies[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name
