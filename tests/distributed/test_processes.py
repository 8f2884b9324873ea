"""The processes of a run agree."""

from __future__ import annotations

import socket
import threading
from datetime import timedelta

import pytest
import torch
from torch import distributed

from llava_core.engine.layout import Layout
from llava_core.engine.processes import Processes
from llava_core.errors import TrainingError
from tests.distributed.processes import TIMEOUT_SECONDS, run_processes
from tests.hardware import hardware


def gather_ranks() -> list[str]:
    rank, size = distributed.get_rank(), distributed.get_world_size()
    return Processes(rank, size, rank, size).gather(f"from {rank}")


def test_every_process_hears_every_other() -> None:
    assert run_processes(3, gather_ranks) == [["from 0", "from 1", "from 2"]] * 3


def test_a_process_alone_hears_itself() -> None:
    assert Processes().gather("me") == ["me"]
    assert Layout().world_size == Processes().size


def test_a_process_alone_has_a_group_where_it_is_asked_for() -> None:
    with Processes().joined(hardware(), timedelta(seconds=TIMEOUT_SECONDS), group_of_one=True):
        total = torch.ones(1)
        distributed.all_reduce(total)
        assert (distributed.get_world_size(), float(total)) == (1, 1.0)
    assert not distributed.is_initialized()


def fail_on_rank_1() -> None:
    if distributed.get_rank() == 1:
        raise ValueError("of its own")


def test_a_failing_process_fails_the_test_with_its_traceback() -> None:
    with pytest.raises(AssertionError, match="process 1:.*\n(.*\n)*ValueError: of its own"):
        run_processes(2, fail_on_rank_1)


def gather_in_two_threads() -> list[list[str]]:
    """The thread's exchanges are begun first in one process, and last in the other."""
    rank, size = distributed.get_rank(), distributed.get_world_size()
    processes = Processes(rank, size, rank, size)
    apart = processes.with_own_channel(timedelta(seconds=TIMEOUT_SECONDS))
    heard: list[list[str]] = []
    thread = threading.Thread(target=lambda: heard.extend(apart.gather(f"{rank} apart") for _ in range(2)))
    if rank == 0:
        thread.start()
    heard_here = [processes.gather(f"{rank}") for _ in range(2)]
    if rank == 1:
        thread.start()
    thread.join()
    return heard_here + heard


def test_a_channel_of_its_own_lets_a_thread_gather_meanwhile() -> None:
    assert run_processes(2, gather_in_two_threads) == [[["0", "1"]] * 2 + [["0 apart", "1 apart"]] * 2] * 2


def test_a_process_alone_needs_no_channel() -> None:
    assert Processes().with_own_channel(timedelta(seconds=1)).gather("me") == ["me"]


def test_a_port_that_is_taken_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        joined = Processes(0, 2, 0, 2).joined(hardware(), timedelta(seconds=5))
        with pytest.raises(TrainingError, match=f"cannot meet at .*port: {port}.*Is the port taken"), joined:
            pass
