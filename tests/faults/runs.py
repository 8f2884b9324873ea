"""Real runs of the command in forked children, to be signalled, killed and started again.

A fork has torch imported already, so that a start takes a fraction of a second, and leaves through `os._exit`. That is
for the host alone: what a device's driver holds in the parent is of no use in a fork, so that there the child becomes a
fresh process of Python. Each child leads a process group of its own, as a job of a shell does.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llava_core.cli.main import main
from llava_core.engine.hardware import HOST
from llava_core.testing.datasets import TinyParts
from llava_core.train import loop
from llava_core.train.checkpoint import open_checkpoint
from llava_core.train.prepare import Run
from llava_core.train.stored import Checkpoint
from tests.hardware import backend_name

STEPS = 12
FINAL = f"step-{STEPS:08d}"
TIMEOUT_SECONDS = 120
MAIN = "from llava_core.cli.main import main; main()"
CLOCKED = {"data_time", "time", "tflops", "tokens_per_sec", "text_tokens_per_sec", "memory"}


@dataclass(frozen=True)
class Command:
    """One `llava-core train` command, to be given again and again."""

    config: Path
    output: Path
    overrides: tuple[str, ...]

    def start(self, before: Callable[[], None] = lambda: None) -> int:
        """Start it in a child; `before` runs there first. The child's process id."""
        child = os.fork()
        if child == 0:
            _run_child(self, before)
        return child

    @property
    def arguments(self) -> list[str]:
        return ["train", str(self.config), f"output={self.output}", *self.overrides]

    @property
    def checkpoints(self) -> list[str]:
        folder = self.output / "checkpoints"
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []

    @property
    def complete_checkpoints(self) -> list[str]:
        return [name for name in self.checkpoints if "." not in name]

    @property
    def log(self) -> str:
        return self.output.with_suffix(".log").read_text()

    def lines(self) -> int:
        """Steps that metrics.jsonl tells of; -1 before there is such a file."""
        path = self.output / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else -1

    def rows(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl without what a clock decides."""
        lines = (self.output / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k not in CLOCKED} for line in lines]

    def final_state(self) -> Checkpoint:
        """What a run that saves its last step ended with."""
        return open_checkpoint(self.output / "checkpoints" / FINAL)


def command(parts: TinyParts, output: Path, *overrides: str) -> Command:
    """A run of STEPS steps on the backend under test that saves the last one."""
    config = output.with_suffix(".yaml")
    backend = {"backend": {"name": backend_name(), "threads": 1}}
    config.write_text(json.dumps(parts.settings(output) | backend))  # JSON is YAML
    common = (f"train.max_steps={STEPS}", "checkpoint.keep=null", f"checkpoint.every_steps={STEPS}")
    return Command(config, output, (*common, *overrides))


def linger() -> None:
    """Before a run that is to be disturbed: its last steps take a second each, so that whoever watches may be late."""
    seed_step = loop.seed_step

    def late(run: Run, step: int) -> None:
        if step > STEPS - 3:
            time.sleep(1)
        seed_step(run, step)

    loop.seed_step = late


def wait_for(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < end, f"no {what} within {TIMEOUT_SECONDS} s"
        time.sleep(0.002)


def wait_for_step(run: Command, child: int, step: int) -> None:
    """Returns once so many steps are done, or the child has ended before."""
    wait_for(lambda: run.lines() >= step or has_ended(child), f"step {step}")


def has_ended(child: int) -> bool:
    """Without taking the exit status, which `exit_code` still wants."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def exit_code(child: int) -> int:
    """Waits for the end: the exit status, or minus the signal that ended it."""
    status: list[int] = []

    def ended() -> bool:
        pid, value = os.waitpid(child, os.WNOHANG)
        if pid:
            status.append(value)
        return bool(pid)

    wait_for(ended, f"end of process {child}")
    return os.waitstatus_to_exitcode(status[0])


def group_is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def assert_same_end(found: Command, expected: Command) -> None:
    """Weights, moments, random state, place in the data and every step's numbers are bit-equal."""
    state, wanted = found.final_state(), expected.final_state()
    assert state.tensors.keys() == wanted.tensors.keys()
    assert [name for name in wanted.tensors if not _same_bits(state.read(name), wanted.read(name))] == []
    assert state.state["loader"] == wanted.state["loader"]
    assert found.rows() == expected.rows()
    export = "hf/model.safetensors"
    assert (found.output / export).read_bytes() == (expected.output / export).read_bytes()


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def _run_child(command: Command, before: Callable[[], None]) -> None:
    code = 70
    try:
        os.setsid()
        descriptor = os.open(command.output.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        if backend_name() != HOST:
            before()
            os.execv(sys.executable, [sys.executable, "-c", MAIN, *command.arguments])
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        warnings.resetwarnings()  # pytest makes errors of them; a user's process prints them
        sys.argv = ["llava-core", *command.arguments]
        before()
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except BaseException:  # the child reports what it saw and ends; nothing may reach the parent's pytest
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
