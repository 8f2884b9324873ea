"""SIGINT and SIGTERM: a run finishes its step, saves once and leaves; what has nothing to save leaves at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether the run was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def agree(self, gather: Callable[[int], list[int]]) -> bool:
        """Whether any process was asked: a signal reaches them at different steps, and all must stop after the same."""
        asked = [number for number in gather(self.signal or 0) if number]
        self.signal = signal.Signals(asked[0]) if asked else None
        return bool(asked)

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as a shell reports a process that a signal ended: 130 or 143."""
        assert self.signal is not None
        return 128 + int(self.signal)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Notes the first SIGINT or SIGTERM instead of dying of it; a second one changes nothing: the save is under way.

    Only the main thread may handle signals; in another one a run is ended by whoever started the thread.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(number: int, _: FrameType | None) -> None:
        request.signal = request.signal or signal.Signals(number)

    with _handled(note):
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
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    previous = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
