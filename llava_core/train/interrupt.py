"""SIGINT and SIGTERM: a run finishes its step, saves once and leaves; what has nothing to save leaves at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether the run was asked to stop, and by which signal.

    Attributes:
        signal: the first that came to this process, or to another of the run.
        agreed: whether all processes had heard of one when they last looked.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.agreed = False

    def agree(self, gather: Callable[[int], list[int]]) -> bool:
        """Whether any process was asked: a signal reaches them at different steps, and all must stop after the same."""
        asked = [number for number in gather(self.signal or 0) if number]
        if asked:  # else one that came while the others were awaited is told them at the next look
            self.signal = signal.Signals(asked[0])
        self.agreed = bool(asked)
        return self.agreed

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as a shell reports a process that a signal ended: 130 or 143."""
        assert self.signal is not None
        return 128 + int(self.signal)


@contextmanager
def stop_on_signals(*, then_ignore: bool = False) -> Iterator[StopRequest]:
    """Notes the first SIGINT or SIGTERM instead of dying of it; a second one changes nothing: the save is under way.

    Only the main thread may handle signals; in another one a run is ended by whoever started the thread.

    Args:
        then_ignore: signals change nothing after a good end, either: the process ends by itself, with nothing to lose.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(number: int, _: FrameType | None) -> None:
        request.signal = request.signal or signal.Signals(number)

    with _handled(note, then_ignore=then_ignore):
        yield request


class Interrupted(KeyboardInterrupt):
    """A signal asked to stop.

    Attributes:
        exit_code: as `StopRequest.exit_code`.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


@contextmanager
def raising_on_signals() -> Iterator[None]:
    """Turns SIGINT and SIGTERM into Interrupted, so that what is half written can be removed. In the main thread."""

    def leave(number: int, _: FrameType | None) -> None:
        raise Interrupted(number)

    with _handled(leave):
        yield


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None], *, then_ignore: bool = False) -> Iterator[None]:
    afterwards = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
        if then_ignore:
            afterwards = dict.fromkeys(SIGNALS, signal.SIG_IGN)
    finally:
        for number, later in afterwards.items():
            signal.signal(number, later)
