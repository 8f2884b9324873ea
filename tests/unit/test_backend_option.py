"""pytest's own option `--backend` (tests/conftest.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_a_backend_that_is_not_there_is_refused_before_any_test() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--backend", "no_such_backend", __file__]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "unknown backend 'no_such_backend'" in done.stderr
