"""Processes that shall not outlive the one that started them."""

from __future__ import annotations

import os
import signal
from pathlib import Path


def end_with_parent(parent: int, number: signal.Signals) -> None:
    """Have a signal sent to this process when its parent dies. Linux alone can; elsewhere nothing happens.

    It may come more than once: a dying parent's threads end one by one, and each passes its children to the next.

    Raises:
        SystemExit: it is dead already.
    """
    if not Path("/proc/self").exists():
        return
    import ctypes

    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2), which Python does not offer
    ctypes.CDLL(None).prctl(set_parent_death_signal, int(number))
    if os.getppid() != parent:
        raise SystemExit(1)
