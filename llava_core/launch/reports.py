"""How a process of a run tells its launcher why it failed: a file of JSON, in the form that torchrun reads as well."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "TORCHELASTIC_ERROR_FILE"
"""Where a launcher, torchrun or this project's own, wants the error of a process."""


def report_error(text: str, environment: Mapping[str, str]) -> bool:
    """Leave what a user should read of this process's error to the launcher; False where there is none to print it."""
    path = environment.get(VARIABLE)
    if path is None:
        return False
    details = {"py_callstack": text, "timestamp": str(int(time.time()))}
    Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": details}}), encoding="utf-8")
    return True


def read_error(path: Path) -> tuple[str, float] | None:
    """What a process reported and when, on the clock of this machine; None where it ended without a word."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):  # a process may be killed while it writes
        return None
    return found["message"]["message"], os.stat(path).st_mtime
