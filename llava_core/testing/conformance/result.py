"""What a certification found, and its form on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

FORMAT = 1
"""Of the JSON; it changes when a field changes its meaning or goes."""


class Status(str, Enum):
    """How a check ended."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Result:
    """One check's outcome.

    Attributes:
        name: what was checked, e.g. `kernel.accuracy`.
        target: on what, e.g. `attention/sdpa/causal/float32`; empty for the backend as a whole.
        explanation: one line: what a pass means.
        message: why it failed or was skipped; what was measured, where it passed.
    """

    name: str
    target: str
    status: Status
    explanation: str
    message: str
    seconds: float

    @property
    def id(self) -> str:
        """Unique within a certificate."""
        return f"{self.name}[{self.target}]" if self.target else self.name


@dataclass(frozen=True)
class Certificate:
    """Every check's outcome on one backend and device.

    As JSON it is one object: `format` (1), `backend`, `device`, `found`, `date`, `versions` (an object of strings),
    `passed`, `failed` and `skipped` (counts), and `checks`, a list of objects with the fields of `Result`; `status` is
    `passed`, `failed` or `skipped`, and `seconds` a number.

    Attributes:
        found: what the backend's probe said of the machine.
        date: the day of the checks, as YYYY-MM-DD (UTC).
    """

    backend: str
    device: str
    found: str
    date: str
    versions: Mapping[str, str]
    checks: tuple[Result, ...] = field(repr=False)

    def count(self, status: Status) -> int:
        """How many checks ended so."""
        return sum(check.status is status for check in self.checks)

    @property
    def ok(self) -> bool:
        """Something was checked, and nothing failed."""
        return self.count(Status.PASSED) > 0 and self.count(Status.FAILED) == 0

    def failures(self) -> list[Result]:
        """The checks that failed, in the order they ran."""
        return [check for check in self.checks if check.status is Status.FAILED]

    def to_json(self) -> str:
        """The form on disk."""
        told = {key: getattr(self, key) for key in ("backend", "device", "found", "date")}
        counts = {status.value: self.count(status) for status in Status}
        checks = [asdict(check) for check in self.checks]
        whole = {"format": FORMAT, **told, "versions": dict(self.versions), **counts, "checks": checks}
        return json.dumps(whole, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Certificate:
        """The certificate that `to_json` wrote.

        Raises:
            ValueError: another format.
        """
        found: dict[str, Any] = json.loads(text)
        if found.get("format") != FORMAT:
            raise ValueError(f"a certificate of format {found.get('format')!r}; this version reads {FORMAT}")
        checks = tuple(Result(**(check | {"status": Status(check["status"])})) for check in found["checks"])
        told = {key: found[key] for key in ("backend", "device", "found", "date", "versions")}
        return cls(**told, checks=checks)
