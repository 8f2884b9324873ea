"""Runs the command line inside the test's process."""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass

import pytest

from llava_core.cli.main import main
from llava_core.train.interrupt import SIGNALS


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> Outcome:
    """What `llava-core ARGUMENTS` exits with and prints."""
    argv, sys.argv = sys.argv, ["llava-core", *map(str, arguments)]
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    code: int | str | None = 0
    try:
        main()
    except SystemExit as exit_:
        code = exit_.code
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)  # a command that ends its process leaves them ignored
    captured = capsys.readouterr()
    return Outcome(int(code or 0), captured.out, captured.err)
