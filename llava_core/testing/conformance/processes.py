"""Checks that need fresh processes: what importing and probing leave behind, and collectives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llava_core.backend import World
from llava_core.testing.conformance.check import Check, CheckFailed, CheckSkipped
from llava_core.testing.conformance.subject import HOST, Subject

TIMEOUT_SECONDS = 300
"""Starting PyTorch takes seconds, on a busy machine a minute; a process that waits for a lost peer never ends."""

WORKER = f"import runpy; runpy.run_path({str(Path(__file__).with_name('worker.py'))!r}, run_name='__main__')"
"""Run by its path: by its name its package, and with it PyTorch, would be imported first; as a script, the files beside
it would hide other packages of their names."""


def checks(subject: Subject) -> Iterator[Check]:
    """One check a fresh process, or two."""
    light = "importing the plugin's module loads neither PyTorch nor another large library"
    quiet = "probing answers with a reason, raises nothing and creates no context on the device"
    alone = "sum, broadcast and gather of one process, in each dtype that it states"
    pair = "sum, broadcast and gather of two processes, in each dtype that it states"
    yield Check("plugin.import", "", light, partial(_check_import, subject))
    yield Check("plugin.probe", "", quiet, partial(_check_probe, subject))
    yield Check("collectives.alone", "", alone, partial(_check_collectives, subject, 1))
    yield Check("collectives.pair", "", pair, partial(_check_collectives, subject, 2))


def _check_import(subject: Subject) -> str:
    if subject.plugin_module is None:
        raise CheckSkipped("no plugin registers this backend")
    loaded = answers(start("import_plugin", {"module": subject.plugin_module}))[0]
    if loaded:
        raise CheckFailed(f"importing {subject.plugin_module} loads {', '.join(loaded)}")
    return subject.plugin_module


def _check_probe(subject: Subject) -> str:
    found = answers(start("probe", {"backend": subject.address}))[0]
    if not found["reason"].strip():
        raise CheckFailed("the probe gives no reason")
    if found["context"]:
        raise CheckFailed("after the probe the device has a context: each process that only lists would hold memory")
    return found["reason"] + ("" if found["context"] is not None else "; PyTorch cannot say whether there is a context")


def _check_collectives(subject: Subject, size: int) -> str:
    num_devices = len(type(subject.backend).probe().devices)
    if subject.device != HOST and num_devices < size:
        raise CheckSkipped(f"{size} processes need as many devices; there are {num_devices}")
    with tempfile.TemporaryDirectory() as folder:
        common = {"backend": subject.address, "size": size, "store": str(Path(folder) / "store")}
        added = type(subject.backend).launch_env(World(size), os.environ)
        found = answers(*(start("collectives", common | {"rank": rank}, added) for rank in range(size)))
    for rank, wrong in enumerate(found):
        for dtype, what in wrong.items():
            if what:
                raise CheckFailed(f"process {rank}: wrong {what} in {dtype}")
    return ", ".join(found[0])


def start(
    task: str, arguments: dict[str, Any], added: Mapping[str, str] = MappingProxyType({})
) -> subprocess.Popen[str]:
    """Begin one of worker.py's tasks in a process of its own, whose environment has `added`."""
    environment = {**os.environ, **added, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", WORKER, task, json.dumps(arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def answers(*processes: subprocess.Popen[str]) -> list[Any]:
    """What each process printed last. None outlives this call."""
    try:
        outputs = [process.communicate(timeout=TIMEOUT_SECONDS) for process in processes]
    except subprocess.TimeoutExpired as error:
        raise CheckFailed(f"a process gave no answer within {TIMEOUT_SECONDS} s") from error
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode:
            raise CheckFailed(f"a process ended with code {process.returncode}:\n{errors[-3000:]}")
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]
