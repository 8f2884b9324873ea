"""Compiles the stand-ins for CANN's libraries, once for each content of the sources and each compiler."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "c"
FLAGS = ("-std=c11", "-O2", "-Wall", "-Wextra", "-D_GNU_SOURCE", "-fPIC", "-shared")
# Each folder of C files is one library; the others that torch_npu links are empty here and share a file.
LIBRARIES = ("ascendcl", "hccl", "atb")
ALIASES_OF_ASCENDCL = ("acl_op_compiler", "acl_tdt_channel", "ge_runner", "graph")


class BuildError(RuntimeError):
    """The stand-ins could not be compiled."""


def cache_folder() -> Path:
    """Where built libraries are kept: ASCEND_SIMULATOR_CACHE, or a folder of the user's cache."""
    if chosen := os.environ.get("ASCEND_SIMULATOR_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ascend_simulator"


def compiler() -> list[str]:
    """The C compiler's command: CC, or the first of cc, gcc and clang that there is."""
    if chosen := os.environ.get("CC"):
        return shlex.split(chosen)
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return [found]
    raise BuildError("no C compiler: install gcc or clang, or name one in CC")


def build() -> Path:
    """The folder with the libraries, built if it is not there yet.

    Raises:
        BuildError: there is no compiler, or it failed.
    """
    command = compiler()
    target = cache_folder() / _key(command)
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as scratch:
            finished = Path(scratch) / "lib"
            finished.mkdir()
            _compile(command, finished)
            _publish(finished, target)
    return target


def _key(command: list[str]) -> str:
    digest = hashlib.sha256(" ".join((*command, *FLAGS, *LIBRARIES, *ALIASES_OF_ASCENDCL)).encode())
    for path in sorted(SOURCES.rglob("*.[ch]")):
        digest.update(path.relative_to(SOURCES).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _compile(command: list[str], folder: Path) -> None:
    for name in LIBRARIES:
        output = folder / f"lib{name}.so"
        files = [str(path) for path in sorted((SOURCES / name).glob("*.c"))]
        # atb reports its refusals through ascendcl.
        links = [f"-L{folder}", "-lascendcl"] if name == "atb" else ["-lpthread"]
        arguments = [*command, *FLAGS, f"-I{SOURCES}", f"-Wl,-soname,{output.name}", "-o", str(output), *files, *links]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BuildError(f"{shlex.join(arguments)} failed with status {done.returncode}:\n{done.stderr}")
    for name in ALIASES_OF_ASCENDCL:
        (folder / f"lib{name}.so").symlink_to("libascendcl.so")


def _publish(finished: Path, target: Path) -> None:
    try:
        finished.rename(target)
    except OSError:
        # Another process was quicker: what it built has the same content.
        if not target.is_dir():
            raise
