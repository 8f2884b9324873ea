"""`ascend-sim`: run a program on simulated NPUs, or only build what it runs on."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ascend_simulator.build import BuildError, build
from ascend_simulator.environment import GIB, MAX_DEVICES, SOCS, Machine, child_environment

# As shells have it: the program is not there, or cannot be run.
NOT_FOUND, NOT_EXECUTABLE = 127, 126


def main(arguments: Sequence[str] | None = None) -> int:
    """The command's exit status: the program's own, 128 + n if signal n ended it, 2 for wrong options."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        libraries = build()
    except BuildError as error:
        print(f"ascend-sim: {error}", file=sys.stderr)
        return 1
    if options.command == "build":
        print(libraries)
        return 0
    program = options.program[1:] if options.program[:1] == ["--"] else options.program
    if not program:
        parser.error("no program given; write: ascend-sim run [options] -- PROGRAM ARGS…")
    try:
        machine = Machine(options.devices, options.soc, int(options.memory_gb * GIB))
    except ValueError as error:
        parser.error(str(error))
    return run(program, machine, libraries)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="ascend-sim", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="compile the stand-ins and print their folder")
    runner = commands.add_parser("run", help="run a program with simulated NPUs")
    runner.add_argument("--devices", type=int, default=1, help=f"how many, from 1 to {MAX_DEVICES} (default 1)")
    runner.add_argument("--soc", choices=list(SOCS), default="910B", help="which chip (default 910B)")
    runner.add_argument("--memory-gb", type=float, default=64.0, help="GiB for each device (default 64)")
    runner.add_argument("program", nargs=argparse.REMAINDER, metavar="-- PROGRAM ARGS…")
    return parser


def run(program: Sequence[str], machine: Machine, libraries: Path) -> int:
    """Runs `program` to its end and returns its exit status. Says on stderr that nothing here is an NPU."""
    if importlib.util.find_spec("torch_npu") is None:
        print("ascend-sim: torch_npu is not installed in this environment; see the README", file=sys.stderr)
        return 1
    version = importlib.metadata.version("ascend-simulator")
    print(f"ascend-sim {version}: SIMULATED, no NPU: {machine.describe()}", file=sys.stderr, flush=True)
    memory_backed = Path("/dev/shm")
    folder = memory_backed if memory_backed.is_dir() and os.access(memory_backed, os.W_OK) else None
    shared = Path(tempfile.mkdtemp(prefix="ascend-simulator-", dir=folder))
    try:
        return _wait_for(program, child_environment(machine, libraries, shared, version, os.environ))
    finally:
        shutil.rmtree(shared, ignore_errors=True)


def _wait_for(program: Sequence[str], environment: dict[str, str]) -> int:
    try:
        child = subprocess.Popen(program, env=environment)
    except FileNotFoundError:
        print(f"ascend-sim: {program[0]}: no such program", file=sys.stderr)
        return NOT_FOUND
    except PermissionError:
        print(f"ascend-sim: {program[0]}: not executable", file=sys.stderr)
        return NOT_EXECUTABLE
    # The terminal sends an interrupt to the program as well: it decides when to end. A termination is passed on.
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)
    passed_on = signal.signal(signal.SIGTERM, lambda number, _: child.send_signal(number))
    try:
        status = child.wait()
    finally:
        signal.signal(signal.SIGINT, ignored)
        signal.signal(signal.SIGTERM, passed_on)
    return 128 - status if status < 0 else status


if __name__ == "__main__":
    sys.exit(main())
