"""The processes of a run agree."""

from __future__ import annotations

import pytest
from torch import distributed

from llava_core.engine.layout import Layout
from llava_core.engine.processes import Processes
from tests.distributed.processes import run_processes


def gather_ranks() -> list[str]:
    rank, size = distributed.get_rank(), distributed.get_world_size()
    return Processes(rank, size, rank, size).gather(f"from {rank}")


def test_every_process_hears_every_other() -> None:
    assert run_processes(3, gather_ranks) == [["from 0", "from 1", "from 2"]] * 3


def test_a_process_alone_hears_itself() -> None:
    assert Processes().gather("me") == ["me"]
    assert Layout().world_size == Processes().size


def fail_on_rank_1() -> None:
    if distributed.get_rank() == 1:
        raise ValueError("of its own")


def test_a_failing_process_fails_the_test_with_its_traceback() -> None:
    with pytest.raises(AssertionError, match="process 1:.*\n(.*\n)*ValueError: of its own"):
        run_processes(2, fail_on_rank_1)
