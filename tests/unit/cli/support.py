"""Runs the command line inside the test's process."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest

from llava_core.cli.main import main


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> Outcome:
    """What `llava-core ARGUMENTS` exits with and prints."""
    argv, sys.argv = sys.argv, ["llava-core", *map(str, arguments)]
    code: int | str | None = 0
    try:
        main()
    except SystemExit as exit_:
        code = exit_.code
    finally:
        sys.argv = argv
    captured = capsys.readouterr()
    return Outcome(int(code or 0), captured.out, captured.err)
