"""A named check, and how it is run."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from llava_core.testing.conformance.result import Result, Status


class CheckFailed(Exception):
    """The backend does not do what the check asks; the message says what was found."""


class CheckSkipped(Exception):
    """The check does not apply here; the message says why."""


@dataclass(frozen=True)
class Check:
    """One thing that a backend must do.

    Attributes:
        name, target, explanation: see `Result`.
        run: raises `CheckFailed` or `CheckSkipped`, or returns what was measured, in a few words or none.
        op, case: names of the catalogue, where the check is of one.
    """

    name: str
    target: str
    explanation: str
    run: Callable[[], str]
    op: str | None = None
    case: str | None = None

    @property
    def id(self) -> str:
        """Unique within a suite."""
        return f"{self.name}[{self.target}]" if self.target else self.name


def run_check(check: Check) -> Result:
    """The check's outcome. One that crashes has failed, and its message is the traceback."""
    start = time.perf_counter()
    try:
        status, message = Status.PASSED, check.run()
    except CheckSkipped as reason:
        status, message = Status.SKIPPED, str(reason)
    except CheckFailed as reason:
        status, message = Status.FAILED, str(reason)
    except Exception:  # the vendor boundary: whatever a kernel raises fails its own check, and the next one runs
        status, message = Status.FAILED, traceback.format_exc()
    return Result(check.name, check.target, status, check.explanation, message, time.perf_counter() - start)
