"""The launcher in forked children of a test, each a machine of its own, running small programs in place of a run."""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llava_core.errors import LlavaError
from llava_core.launch.plan import Plan
from llava_core.launch.supervise import launch

TIMEOUT_SECONDS = 60

PROLOGUE = """
import json, os, pathlib, signal, sys, time
from llava_core.launch.reports import report_error
from llava_core.launch.ranks import end_with_launcher

folder, rank = pathlib.Path(sys.argv[1]), int(os.environ["RANK"])
end_with_launcher(os.environ)

def put(name, value=""):
    (folder / f".{name}-{rank}").write_text(str(value))
    (folder / f".{name}-{rank}").rename(folder / f"{name}-{rank}")

def fail(text, code=1):
    report_error(text, os.environ)
    sys.exit(code)

def await_file(name):
    while not (folder / name).exists():
        time.sleep(0.01)

def stop_on(number, frame):
    signals.append(number)

signals = []
put("pid", os.getpid())
"""

SAVES = """
signal.signal(signal.SIGINT, stop_on)
signal.signal(signal.SIGTERM, stop_on)
put("ready")
while not signals:
    time.sleep(0.01)
put("asked")
time.sleep(SAVE_SECONDS)
put("saved", signals)
sys.exit(128 + signals[0])
"""
"""A process that takes its time to save when it is asked to stop."""


@dataclass
class Machine:
    """A launcher in a child of this process."""

    pid: int
    log: Path
    logs: Path
    code: int | None = field(default=None)

    def wait(self, seconds: float = TIMEOUT_SECONDS) -> int:
        """Its exit code, or minus the signal that ended it."""
        await_true(self._has_ended, f"end of the launcher; it printed {self.log.read_text()}", seconds)
        assert self.code is not None
        return self.code

    @property
    def printed(self) -> str:
        return self.log.read_text()

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def _has_ended(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None


@dataclass
class World:
    """What a test sees of its launchers and their processes. Leaving it, none is left."""

    folder: Path
    machines: list[Machine] = field(default_factory=list)

    def start(self, program: str, plan: Plan, *, stop_seconds: float = 30, start_seconds: float = 30) -> Machine:
        """Begin a launcher that runs `program` in the processes of `plan`."""
        script = self.folder / "program.py"
        script.write_text(PROLOGUE + program)
        name = f"machine-{len(self.machines)}"
        log, logs = self.folder / f"{name}.log", self.folder / "logs"
        command = [sys.executable, str(script), str(self.folder)]
        child = os.fork()
        if child == 0:
            _be_launcher(
                log,
                lambda: launch(command, plan, os.environ, logs, stop_seconds=stop_seconds, start_seconds=start_seconds),
            )
        log.touch()
        self.machines.append(Machine(child, log, logs))
        return self.machines[-1]

    def find(self, name: str, ranks: Sequence[int]) -> list[str]:
        """What each of the ranks put under that name; waits for it."""
        paths = [self.folder / f"{name}-{rank}" for rank in ranks]
        await_true(lambda: all(path.exists() for path in paths), f"{name} of {ranks}")
        return [path.read_text() for path in paths]

    def put(self, name: str) -> None:
        (self.folder / name).touch()

    def alive(self) -> list[int]:
        """The processes of a run that still are there."""
        pids = [int(path.read_text()) for path in self.folder.glob("pid-*")]
        return [pid for pid in pids if _is_alive(pid)]

    def clear(self) -> None:
        for machine in self.machines:
            if machine.code is None:
                os.kill(machine.pid, signal.SIGKILL)
                os.waitpid(machine.pid, 0)
        for pid in self.alive():
            os.kill(pid, signal.SIGKILL)


def free_port() -> int:
    """A port that nobody has, below those that the system gives to whoever asks for any: it is still free when used."""
    ports = random.SystemRandom()  # not seeded: tests that run side by side must not draw the same
    while True:
        port = ports.randrange(20_000, 32_000)
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return port


def await_true(condition: Callable[[], bool], what: str, seconds: float = TIMEOUT_SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"no {what} within {seconds} s"
        time.sleep(0.01)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _be_launcher(log: Path, work: Callable[[], int]) -> None:
    code = 70
    try:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        code = work()
    except LlavaError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code = 2
    except BaseException:  # the child reports what it saw and ends; nothing may reach the parent's pytest
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
