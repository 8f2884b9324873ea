"""SIGINT and SIGTERM during a run: finish the step, save once, leave."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether the run was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

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

    previous = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
