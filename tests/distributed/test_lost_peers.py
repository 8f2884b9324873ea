"""Processes that lose one of theirs: the others name it."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection

import pytest
from torch import distributed

from llava_core.data.batch import Labelled
from llava_core.engine.hardware import HOST, Hardware, open_hardware
from llava_core.engine.layout import Layout
from llava_core.engine.mesh import Mesh
from llava_core.engine.processes import Processes
from llava_core.errors import TrainingError
from llava_core.plugins import Registry
from tests.distributed.layouts import build_engine, take_share
from tests.unit.engine.support import batches, examples

TIMEOUT = timedelta(seconds=5)
"""Of each exchange, and of the meeting before the first, which three processes on a busy core need some time for."""

WAIT_SECONDS = 60
HOST_NAME = os.uname().nodename
LOOPBACK = "127.0.0.1"


class Peers:
    """Processes of one run, forked from the test; what the launcher would tell them is in their environment."""

    def __init__(self, work: Callable[[Processes], object], size: int = 3, timeout: timedelta = TIMEOUT) -> None:
        self._store = distributed.TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("fork")
        hardware = open_hardware(HOST, Registry.discover(), threads=1)
        self._receivers, self.children = [], []
        for rank in range(size):
            receiver, sender = context.Pipe(duplex=False)
            arguments = (Processes(rank, size, rank, size), hardware, self._store.port, sender, work, timeout)
            child = context.Process(target=_be_peer, args=arguments)
            child.start()
            sender.close()
            self._receivers.append(receiver)
            self.children.append(child)

    def answer(self, rank: int) -> str:
        """What the work of that process raised."""
        receiver = self._receivers[rank]
        assert receiver.poll(WAIT_SECONDS), f"rank {rank} gave no answer"
        answer: str = receiver.recv()
        return answer


def _be_peer(
    processes: Processes,
    hardware: Hardware,
    port: int,
    sender: Connection,
    work: Callable[[Processes], object],
    timeout: timedelta,
) -> None:
    os.environ.update(MASTER_ADDR=LOOPBACK, MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    try:
        with processes.joined(hardware, timeout):
            sender.send(repr(work(processes)))
    except (TrainingError, ArithmeticError) as error:
        sender.send(f"{type(error).__name__}: {error}")
    sender.close()
    os._exit(0)


@pytest.fixture
def peers() -> Iterator[Callable[..., Peers]]:
    started: list[Peers] = []

    def start(work: Callable[[Processes], object], size: int = 3, timeout: timedelta = TIMEOUT) -> Peers:
        started.append(Peers(work, size, timeout))
        return started[-1]

    yield start
    for child in [child for peers in started for child in peers.children]:
        child.kill()
        child.join()


def gather_twice_without_1(processes: Processes) -> object:
    processes.gather("here")
    if processes.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    return processes.gather("still here")


def test_a_process_that_stops_is_named_by_the_others(peers: Callable[..., Peers]) -> None:
    found = peers(gather_twice_without_1)
    for rank in (0, 2):
        answer = found.answer(rank)
        assert answer.startswith(f"TrainingError: no answer from rank 1 on {HOST_NAME}: ")
        assert "rank 0" not in answer
        assert "rank 2" not in answer


def die_in_a_gather(processes: Processes) -> object:
    processes.gather("here")
    if processes.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return processes.gather("still here")


def test_a_process_that_is_killed_is_named_by_the_others(peers: Callable[..., Peers]) -> None:
    found = peers(die_in_a_gather)
    assert [found.answer(rank).partition(": it")[0] for rank in (1, 2)] == [
        f"TrainingError: no answer from rank 0 on {HOST_NAME}"
    ] * 2


def gather_once(processes: Processes) -> object:
    return processes.gather("here")


def die_in_a_pipeline(processes: Processes) -> object:
    trained = build_engine(Mesh.build(processes, Layout(pipeline=2), HOST))
    whole = batches(examples(trained.model.spec), [3, 5])
    if processes.rank == 1:
        trained.stages[0].register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    return trained.step(take_share(whole, trained), 1.0, Labelled.of(whole))


def test_a_stage_of_a_pipeline_that_is_killed_is_named_by_the_others(peers: Callable[..., Peers]) -> None:
    """In the middle of a step, where the others wait for what it sends."""
    answer = peers(die_in_a_pipeline, 2, timeout=timedelta(seconds=60)).answer(0)
    assert answer.startswith(f"TrainingError: no answer from rank 1 on {HOST_NAME}: ")


def fail_in_a_pipeline(processes: Processes) -> object:
    trained = build_engine(Mesh.build(processes, Layout(pipeline=2), HOST))
    whole = batches(examples(trained.model.spec), [3, 5])
    if processes.rank == 1:
        trained.stages[0].register_forward_pre_hook(lambda *_: 1 // 0)
    return trained.step(take_share(whole, trained), 1.0, Labelled.of(whole))


def test_an_error_of_a_stage_stays_what_it_is(peers: Callable[..., Peers]) -> None:
    found = peers(fail_in_a_pipeline, 2, timeout=timedelta(seconds=60))
    assert found.answer(1).startswith("ZeroDivisionError")
    assert "no answer from rank 1" in found.answer(0)


def fail_alone(processes: Processes) -> object:
    processes.gather("here")
    if processes.rank == 1:
        raise ZeroDivisionError("of its own")
    return processes.gather("still here")


def test_an_error_of_its_own_stays_what_it_is(peers: Callable[..., Peers]) -> None:
    found = peers(fail_alone, 2)
    assert found.answer(1) == "ZeroDivisionError: of its own"
    assert "no answer from rank 1" in found.answer(0)


def test_processes_that_end_well_say_nothing(peers: Callable[..., Peers]) -> None:
    found = peers(gather_once, 2)
    assert [found.answer(rank) for rank in (0, 1)] == ["['here', 'here']"] * 2
