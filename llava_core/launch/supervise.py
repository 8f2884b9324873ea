"""Runs a command in as many processes as planned, passes signals on, and ends all when one fails."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console

from llava_core.launch.meeting import START_SECONDS, End, Meeting, Outcome
from llava_core.launch.plan import Plan
from llava_core.launch.ranks import INTERRUPTED, Failure, LocalRanks

LOOK_SECONDS = 0.1

GRACE_SECONDS = 5.0
"""After a failure, for the others to end by themselves. A save that is cut off then is no loss: it had no name yet."""


def launch(
    command: Sequence[str],
    plan: Plan,
    environment: Mapping[str, str],
    logs: Path,
    *,
    stop_seconds: float,
    start_seconds: float = START_SECONDS,
) -> int:
    """Run `command` in the processes of `plan` that are this machine's, to their end. Its exit code.

    torch's elastic launcher gives the processes of a machine 30 s after a failure, does not tell other machines, takes
    a process that was interrupted for one that failed, and kills those that still save. So these are its variables and
    its files for errors, and another watch.

    Args:
        logs: the folder for what every process but the first prints.
        stop_seconds: how long processes that were asked to stop may take to save.

    Raises:
        LlavaError: the machines do not meet.
    """
    console = Console(stderr=True, highlight=False)

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    meeting = Meeting(plan, say, start_seconds)
    with received_signals() as received, LocalRanks(command, meeting.plan, environment, logs) as ranks:
        watch(ranks, meeting, received, stop_seconds)
        ranks.log_errors()
        outcome = meeting.leave(
            Outcome(ranks.codes(), ranks.failures()), GRACE_SECONDS * 2, lambda: wants_out(received)
        )
    return conclude(outcome, meeting.ended, logs, console)


@contextmanager
def received_signals() -> Iterator[list[signal.Signals]]:
    """The SIGINTs and SIGTERMs that came, in their order; none ends this process."""
    received: list[signal.Signals] = []

    def note(number: int, _: FrameType | None) -> None:
        received.append(signal.Signals(number))

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def wants_out(received: Sequence[signal.Signals]) -> bool:
    """Whether the user lost patience: SIGINT after a first signal. A scheduler may well repeat its SIGTERM."""
    return signal.SIGINT in received[1:]


def watch(ranks: LocalRanks, meeting: Meeting, received: Sequence[signal.Signals], stop_seconds: float) -> None:
    """Until every process of this machine has ended, or was killed: one that hangs in a driver outlives even that."""
    deadline, passed_on, ending = float("inf"), False, False
    while True:
        ranks.look()
        codes = ranks.codes()
        if received and -received[0] in codes:  # it could not handle it yet
            meeting.tell_end(End("stopped before the training began", 128 + received[0]))
        elif ranks.failures():
            meeting.tell_end(End())
        if meeting.ended is not None and not ending:
            ranks.send(signal.SIGTERM)  # who can still end in order, shall
            deadline, ending = min(deadline, time.monotonic() + GRACE_SECONDS), True
        if not ranks.running:
            return
        if received and not passed_on:
            ranks.send(received[0])
            passed_on = True
        if deadline == float("inf") and (received or any(code in INTERRUPTED for code in codes)):
            deadline = time.monotonic() + stop_seconds
        if wants_out(received):
            meeting.tell_end(End("stopped at once; what was not saved is lost", 128 + received[0]))
            ranks.kill()
            return
        if time.monotonic() > deadline:
            meeting.tell_end(End(f"asked to stop, processes had not saved within {stop_seconds:g} s and were ended"))
            ranks.kill()
            return
        time.sleep(LOOK_SECONDS)


def conclude(outcome: Outcome, end: End | None, logs: Path, console: Console) -> int:
    """Says how the run ended, if not well, and gives the exit code that says the same."""
    cause = first_cause(outcome.failures)
    if end is None and cause is None:
        return next((code for code in outcome.codes if code in INTERRUPTED), 0)
    if end is not None and end.reason and (cause is None or cause.text is not None):
        message, code = f"error: {end.reason}", end.code
    elif cause is not None:
        message, code = describe(cause, logs), cause.code if cause.code in (1, 2) else 1
    else:
        message, code = "error: a process failed on a machine that did not say which", 1
    console.show_cursor()  # a progress bar that was killed had hidden it
    console.print(message, style="red", markup=False, soft_wrap=True)
    if len(outcome.codes) > 1:
        console.print(f"What the other processes said is in {logs}", markup=False, soft_wrap=True)
    return code


def describe(failure: Failure, logs: Path) -> str:
    """Which process failed, and how."""
    where = "printed above" if failure.rank == 0 else f"in {logs}/rank-{failure.rank}.log"
    said = f":\n{failure.text}" if failure.text else f" without a word; what it said before is {where}"
    return f"rank {failure.rank} on {failure.host} (pid {failure.pid}) {failure.how}{said}"


def first_cause(failures: Sequence[Failure]) -> Failure | None:
    """Who failed by itself. One that ended without a word (killed, out of memory, a crash in a library) comes before
    those that report an error, for theirs may be that they lost it; among those, the earliest."""
    return min(failures, key=lambda failure: (failure.text is not None, failure.time), default=None)
