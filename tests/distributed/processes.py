"""Several processes of one test, forked from it: a fork has torch imported already, and starts in milliseconds."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from torch import distributed

T = TypeVar("T")

TIMEOUT_SECONDS = 300
"""For all of them together: a process that waits for a lost peer never ends by itself. Four that compile on two busy
cores take two minutes."""


def run_processes(size: int, work: Callable[..., T], *arguments: Any) -> list[T]:
    """What `work(*arguments)` returns in each of `size` processes of one gloo group, by rank.

    Results are pickled. No process outlives this call.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(size)]
        children = [
            context.Process(target=_run, args=(rank, size, Path(folder) / "store", sender, work, arguments))
            for rank, (_, sender) in enumerate(pipes)
        ]
        for child in children:
            child.start()
        for _, sender in pipes:
            sender.close()  # so that a child's end is seen here
        try:
            answers = _collect([receiver for receiver, _ in pipes])
        finally:
            for child in children:
                child.kill()
                child.join()
    failed = [f"process {rank}:\n{answer}" for rank, (good, answer) in enumerate(answers) if not good]
    assert not failed, "\n".join(failed)
    return [answer for _, answer in answers]


def _collect(receivers: list[Connection]) -> list[tuple[bool, Any]]:
    end = time.monotonic() + TIMEOUT_SECONDS
    answers: list[tuple[bool, Any]] = []
    for receiver in receivers:
        if not receiver.poll(max(0.0, end - time.monotonic())):
            answers.append((False, f"no answer within {TIMEOUT_SECONDS} s"))
            continue
        try:
            answers.append(pickle.loads(receiver.recv_bytes()))
        except EOFError:
            answers.append((False, "it ended without an answer"))
    return answers


def _run(
    rank: int, size: int, store: Path, sender: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    try:
        distributed.init_process_group(
            "gloo",
            store=distributed.FileStore(str(store), size),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=TIMEOUT_SECONDS),
        )
        answer = (True, work(*arguments))
        distributed.barrier()  # a peer may still be reading from this process
        distributed.destroy_process_group()
    except BaseException:  # whatever it is, the test shall show it
        answer = (False, traceback.format_exc())
    sender.send_bytes(pickle.dumps(answer))
