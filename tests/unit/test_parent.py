"""A process that was started by one that is gone already."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import os, signal
from llava_core.parent import end_with_parent
end_with_parent(os.getppid(), signal.SIGKILL)
print("its parent is there", flush=True)
end_with_parent(os.getppid() + 1, signal.SIGKILL)
print("went on")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux alone tells of a parent's end")
def test_it_ends_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "its parent is there\n"), done.stderr
