"""The processes of a run on this machine: started, watched and ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from llava_core.launch.plan import Plan
from llava_core.launch.reports import VARIABLE, read_error
from llava_core.parent import end_with_parent

INTERRUPTED = (130, 143)
"""What a process ends with that saved its state because of SIGINT or SIGTERM."""

KILL_SECONDS = 10
"""A process that hangs inside a device's driver does not end even when it is killed."""

LAST_WORDS = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
"""A process that is killed or crashes has said all that it printed, and where it was."""

PARENT = "LLAVA_CORE_LAUNCHER"
"""The launcher's process id, for its processes: see `end_with_launcher`."""


@dataclass(frozen=True)
class Failure:
    """How a process ended that should not have.

    Attributes:
        code: its exit code, or minus the signal that ended it.
        text: what it reported; None where it ended without a word.
        time: when it reported or was seen to have ended.
    """

    rank: int
    host: str
    pid: int
    code: int
    text: str | None
    time: float

    @property
    def how(self) -> str:
        """The end in words."""
        if self.code >= 0:
            return f"ended with exit code {self.code}"
        return f"was ended by {signal.Signals(-self.code).name}"


class Rank:
    """One process. It leads a process group, so that what it started ends with it and a terminal's Ctrl-C passes it by:
    signals come from the launcher alone, once."""

    def __init__(self, number: int, process: subprocess.Popen[bytes], log: Path, report: Path) -> None:
        self.number = number
        self.log = log
        self.code: int | None = None
        self._process = process
        self._report = report
        self._end = 0.0
        self._sent: set[int] = set()

    def look(self) -> None:
        """Notices its end, and ends what it left behind."""
        if self.code is not None:
            return
        pid = self._process.pid
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return
        self._end = time.time()
        os.killpg(pid, signal.SIGKILL)  # before its status is taken, while the number cannot be another's
        self.code = self._process.wait()

    def send(self, number: signal.Signals) -> None:
        """To the process itself: those that read data for it are its own to end."""
        if self.code is None:
            self._sent.add(number)
            os.kill(self._process.pid, number)

    def send_group(self, number: signal.Signals) -> None:
        """To the process and all that it started."""
        if self.code is None:
            self._sent.add(number)
            os.killpg(self._process.pid, number)

    def failure(self) -> Failure | None:
        """None while it runs, and where it ended well, interrupted, or by the launcher's own signal."""
        if self.code is None or self.code in (0, *INTERRUPTED) or -self.code in self._sent:
            return None
        text, moment = read_error(self._report) or (None, self._end)
        return Failure(self.number, socket.gethostname(), self._process.pid, self.code, text, moment)


class LocalRanks:
    """All processes on this machine. Leaving the context ends those that still run."""

    def __init__(self, command: Sequence[str], plan: Plan, environment: Mapping[str, str], logs: Path) -> None:
        self._command = command
        self._plan = plan
        self._environment = environment
        self._logs = logs
        self._stack = ExitStack()
        self._ranks: list[Rank] = []

    def __enter__(self) -> LocalRanks:
        """Starts them. Rank 0 prints where the launcher prints, each other into a log of its own."""
        self._logs.mkdir(parents=True, exist_ok=True)
        reports = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="llava-core-")))
        try:
            for local_rank in range(self._plan.nproc):
                self._ranks.append(self._start(local_rank, reports))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._stack.close()

    @property
    def running(self) -> bool:
        """Whether any process runs, as of the last look."""
        return any(rank.code is None for rank in self._ranks)

    def look(self) -> None:
        """Notices which have ended."""
        for rank in self._ranks:
            rank.look()

    def codes(self) -> list[int]:
        """The exit codes of those that have ended."""
        return [rank.code for rank in self._ranks if rank.code is not None]

    def failures(self) -> list[Failure]:
        """Of those that have ended."""
        return [failure for rank in self._ranks if (failure := rank.failure()) is not None]

    def send(self, number: signal.Signals) -> None:
        """A signal to each process that runs."""
        for rank in self._ranks:
            rank.send(number)

    def kill(self) -> None:
        """End all of them, and what they started, now."""
        for rank in self._ranks:
            rank.send_group(signal.SIGKILL)
        end = time.monotonic() + KILL_SECONDS
        while self.running and time.monotonic() < end:
            self.look()
            time.sleep(0.01)

    def log_errors(self) -> None:
        """Puts what each process reported into its log, where it stays."""
        for rank in self._ranks:
            failure = rank.failure()
            if failure is not None:
                with rank.log.open("a", encoding="utf-8") as log:
                    log.write(f"rank {failure.rank} {failure.how}\n{failure.text or ''}\n")

    def _start(self, local_rank: int, reports: Path) -> Rank:
        plan = self._plan
        number = plan.node_rank * plan.nproc + local_rank
        log, report = self._logs / f"rank-{number}.log", reports / f"rank-{number}.json"
        added = {
            "RANK": number,
            "WORLD_SIZE": plan.size,
            "LOCAL_RANK": local_rank,
            "LOCAL_WORLD_SIZE": plan.nproc,
            "GROUP_RANK": plan.node_rank,
            "GROUP_WORLD_SIZE": plan.nnodes,
            "MASTER_ADDR": plan.master_addr,
            "MASTER_PORT": plan.master_port,
            # The launcher of node 0 holds the store in which the processes meet, so that it outlives each of them.
            "TORCHELASTIC_USE_AGENT_STORE": True,
            VARIABLE: report,
            PARENT: os.getpid(),
        }
        with ExitStack() as stack:
            output = None if number == 0 else stack.enter_context(log.open("ab"))
            process = subprocess.Popen(
                self._command,
                env={**LAST_WORDS, **self._environment, **{name: str(value) for name, value in added.items()}},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        return Rank(number, process, log, report)


def end_with_launcher(environment: Mapping[str, str]) -> None:
    """Have SIGTERM sent to this process when its launcher dies, so that nobody is left behind. As `end_with_parent`."""
    launcher = environment.get(PARENT)
    if launcher is not None:
        end_with_parent(int(launcher), signal.SIGTERM)
