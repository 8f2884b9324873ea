"""`llava-core` in processes that are forked from one that has imported it, which takes longer than a tiny run."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.distributed.launching import free_port

TIMEOUT_SECONDS = 300

PRELOADED = ["torch", "transformers.models.clip.modeling_clip", "llava_core.cli.main", "llava_core.train.loop"]
"""And so torch's extension, where one is installed; it opens no device before it is used."""


def run_forked(arguments: Sequence[str], log: Path, *, nproc: int = 1) -> None:
    """Runs `llava-core ARGUMENTS` as `--nproc` would, each process as a fork that must end well.

    Args:
        log: gets what rank 0 prints; the others' are beside it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port = free_port()
    logs = [log, *(log.with_name(f"{log.name}.{rank}") for rank in range(1, nproc))]
    ranks = [
        context.Process(target=_run, args=(tuple(arguments), rank, nproc, port, logs[rank])) for rank in range(nproc)
    ]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(TIMEOUT_SECONDS)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    codes = [process.exitcode for process in ranks]
    assert codes == [0] * nproc, f"{codes}\n" + "\n".join(log.read_text() for log in logs)


def _run(arguments: tuple[str, ...], rank: int, size: int, port: int, log: Path) -> None:
    from llava_core.cli.main import main

    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    if size > 1:
        os.environ.update(zip(names, map(str, (rank, size, rank, size, port)), strict=True), MASTER_ADDR="127.0.0.1")
    written = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(written, 1)
    os.dup2(written, 2)
    sys.argv = ["llava-core", *arguments]
    main()
