"""The Makefile's decisions. Environments and their programs are stand-ins, so that nothing is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
USED = ("sh", "make", "uname")


@pytest.mark.parametrize("compiler", ["cc", "gcc", "clang", None])
def test_the_npu_half_runs_with_any_compiler_that_the_simulator_takes(tmp_path: Path, compiler: str | None) -> None:
    paths = {name: shutil.which(name) for name in USED}
    if os.uname().sysname != "Linux" or None in paths.values():
        pytest.skip(f"needs Linux and {', '.join(USED)}")
    programs, environment = tmp_path / "programs", tmp_path / "environment"
    for name, path in paths.items():
        link(programs / name, Path(str(path)))
    if compiler is not None:
        link(programs / compiler, Path(str(paths["sh"])))
    stand_in(environment / "bin/ascend-sim", "#!/bin/sh\necho simulated $*\n")
    stand_in(environment / "bin/python", "#!/bin/sh\nexit 1\n")
    (environment / ".installed-npu").touch()

    command = ["make", "-C", str(ROOT), "test-npu", f"NPU_VENV={environment}"]
    variables = {k: v for k, v in os.environ.items() if k not in ("CC", "MAKEFLAGS", "MAKELEVEL")}
    variables["PATH"] = str(programs)
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ("was not run: the simulator needs gcc or clang" in done.stdout) == (compiler is None)
    assert ("simulated" in done.stdout) == (compiler is not None)


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def stand_in(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
