"""Processes started, signalled, killed and stopped: how a run of many ends."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llava_core.launch import meeting
from llava_core.launch.meeting import BEAT_SECONDS, End, Meeting, Outcome
from llava_core.launch.plan import Plan
from tests.distributed.launching import SAVES, World, await_true, free_port

END_SECONDS = 10
"""Within this after a failure, nothing runs any more: what the documentation promises."""

FOREVER = "time.sleep(1000)"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    found = World(tmp_path)
    yield found
    found.clear()


def two_machines(world: World, program: str, nproc: int = 1) -> None:
    port = free_port()
    for node in (0, 1):
        world.start(program, Plan(nproc, 2, node, "127.0.0.1", port))


def test_each_process_is_told_who_it_is(world: World) -> None:
    two_machines(world, 'put("told", json.dumps(dict(os.environ)))', nproc=2)
    assert [machine.wait() for machine in world.machines] == [0, 0]
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
    told = [json.loads(text) for text in world.find("told", range(4))]
    assert [[int(variables[name]) for name in names] for variables in told] == [
        [0, 4, 0, 2, 0, 2],
        [1, 4, 1, 2, 0, 2],
        [2, 4, 0, 2, 1, 2],
        [3, 4, 1, 2, 1, 2],
    ]


def test_rank_0_prints_and_the_others_write_logs(world: World) -> None:
    machine = world.start('print("out of", rank); print("err of", rank, file=sys.stderr)', Plan(3))
    assert machine.wait() == 0
    assert sorted(machine.printed.splitlines()) == ["err of 0", "out of 0"]
    for rank in (1, 2):
        assert sorted((machine.logs / f"rank-{rank}.log").read_text().splitlines()) == [
            f"err of {rank}",
            f"out of {rank}",
        ]


def test_processes_meet_in_the_launchers_store(world: World) -> None:
    program = """
from torch import distributed
distributed.init_process_group("gloo")
found = [None] * distributed.get_world_size()
distributed.all_gather_object(found, rank)
put("found", found)
distributed.destroy_process_group()
"""
    two_machines(world, program)
    assert [machine.wait() for machine in world.machines] == [0, 0], world.machines[0].printed
    assert world.find("found", (0, 1)) == ["[0, 1]", "[0, 1]"]


def test_a_machine_that_has_left_needs_the_store_no_more() -> None:
    port = free_port()
    plans = [Plan(1, 2, node_rank, "127.0.0.1", port) for node_rank in range(2)]
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(lambda plan: Meeting(plan, print), plans)
        done = Outcome([0], [])
        outcomes = list(threads.map(lambda each: each.leave(done, 10, lambda: False), (first, second)))
    assert [outcome.codes for outcome in outcomes] == [[0, 0], [0, 0]]
    del first  # and with it the store
    time.sleep(BEAT_SECONDS)
    assert second.ended is None


def test_where_all_went_well_the_store_waits_for_a_slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "LEAVE_SECONDS", 0.1)
    port, done = free_port(), Outcome([0], [])
    plans = [Plan(1, 2, node_rank, "127.0.0.1", port) for node_rank in range(2)]
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(lambda plan: Meeting(plan, print), plans)
        leaving = threads.submit(first.leave, done, 10, lambda: False)

        def held_up() -> bool:
            """It has told how it ended, and asks this before it reads how the other did."""
            time.sleep(1)
            return False

        assert second.leave(done, 10, held_up).codes == [0, 0]
        assert leaving.result(10).codes == [0, 0]
    assert second.ended is None


def test_after_a_second_interrupt_the_store_waits_for_the_machines_that_are_told() -> None:
    port, nothing, end = free_port(), Outcome([], []), End("stopped at once", 130)
    plans = [Plan(1, 2, node_rank, "127.0.0.1", port) for node_rank in range(2)]
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(lambda plan: Meeting(plan, print), plans)
        first.tell_end(end)
        leaving = threads.submit(first.leave, nothing, 10, lambda: True)
        time.sleep(0.5)
        assert not leaving.done()
        assert second.ended == end
        second.leave(nothing, 10, lambda: True)
        leaving.result(10)


@pytest.mark.parametrize("code", [1, 2])
def test_a_failure_ends_the_run_with_its_own_message_and_code(code: int, world: World) -> None:
    program = f'if rank == 1:\n    await_file("go")\n    fail("error: the reason", {code})\n{FOREVER}'
    machine = world.start(program, Plan(3))
    world.find("pid", range(3))
    world.put("go")
    assert machine.wait(END_SECONDS) == code
    assert f"rank 1 on {os.uname().nodename}" in machine.printed
    assert f"exit code {code}:\nerror: the reason" in machine.printed
    assert "Traceback" not in machine.printed
    assert world.alive() == []


def test_an_error_that_all_share_is_printed_once(world: World) -> None:
    machine = world.start('fail("error: the reason", 2)', Plan(3))
    assert machine.wait() == 2
    assert machine.printed.count("the reason") == 1
    assert any("the reason" in log.read_text() for log in machine.logs.iterdir())


def test_a_killed_process_is_named_before_those_that_miss_it(world: World) -> None:
    program = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # so that it reports, however soon it is told to end
put("ready")
if rank == 1:
    time.sleep(1000)
await_file("killed")
fail("error: lost a peer")
"""
    machine = world.start(program, Plan(3))
    world.find("ready", range(3))
    os.kill(int(world.find("pid", [1])[0]), signal.SIGKILL)
    world.put("killed")
    assert machine.wait(END_SECONDS) == 1
    assert "rank 1" in machine.printed
    assert "was ended by SIGKILL" in machine.printed
    assert "lost a peer" not in machine.printed
    assert "lost a peer" in (machine.logs / "rank-0.log").read_text()
    assert world.alive() == []


def test_a_crash_keeps_what_was_printed_and_says_where(world: World) -> None:
    machine = world.start('print("last words")\nif rank == 1:\n    os.abort()\n' + FOREVER, Plan(2))
    assert machine.wait() == 1
    assert "rank 1" in machine.printed
    assert "was ended by SIGABRT" in machine.printed
    log = (machine.logs / "rank-1.log").read_text()
    assert "last words" in log
    assert "program.py" in log


def test_a_process_that_ignores_the_end_of_others_is_killed_with_its_children(world: World) -> None:
    program = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if rank == 0:
    child = os.fork()
    (folder / ("pid-child" if child == 0 else "ready-0")).write_text(str(os.getpid()))
    time.sleep(1000)
await_file("pid-child")
sys.exit(5)
"""
    machine = world.start(program, Plan(2))
    assert machine.wait() == 1
    assert "rank 1" in machine.printed
    assert "exit code 5 without a word" in machine.printed
    await_true(lambda: world.alive() == [], "end of the child's child")


def test_a_failure_on_one_machine_ends_the_other(world: World) -> None:
    two_machines(world, f'if rank == 1:\n    await_file("go")\n    fail("error: the reason", 2)\n{FOREVER}')
    world.find("pid", range(2))
    world.put("go")
    assert [machine.wait(END_SECONDS) for machine in world.machines] == [2, 2]
    for machine in world.machines:
        assert "rank 1" in machine.printed
        assert "the reason" in machine.printed
    assert world.alive() == []


@pytest.mark.parametrize("node", [0, 1])
def test_a_launcher_that_dies_leaves_nobody_behind(node: int, world: World) -> None:
    two_machines(world, SAVES.replace("SAVE_SECONDS", "0"))
    world.find("ready", range(2))
    world.machines[node].send(signal.SIGKILL)
    (received,) = world.find("saved", [node])
    assert set(json.loads(received)) == {int(signal.SIGTERM)}  # once for each thread that the launcher had
    if node == 0:  # it held the store
        assert world.machines[1].wait(END_SECONDS) == 1
        assert "the launcher of node 0, at 127.0.0.1, is gone" in world.machines[1].printed
        await_true(lambda: world.alive() == [], "end of all processes")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_reaches_each_process_once_and_its_save_is_awaited(
    number: signal.Signals, code: int, world: World
) -> None:
    machine = world.start(SAVES.replace("SAVE_SECONDS", "2 if rank == 0 else 0"), Plan(2))
    world.find("ready", range(2))
    os.killpg(machine.pid, number)  # as a terminal does
    assert machine.wait() == code
    assert world.find("saved", range(2)) == [f"[{int(number)}]"] * 2
    assert machine.printed == ""


def test_a_second_interrupt_stops_at_once(world: World) -> None:
    machine = world.start(SAVES.replace("SAVE_SECONDS", "1000"), Plan(2))
    world.find("ready", range(2))
    machine.send(signal.SIGINT)
    world.find("asked", range(2))  # two signals at once may be taken for one
    machine.send(signal.SIGINT)
    assert machine.wait(END_SECONDS) == 130
    assert world.alive() == []


def test_a_second_sigterm_changes_nothing(world: World) -> None:
    machine = world.start(SAVES.replace("SAVE_SECONDS", "1"), Plan(2))
    world.find("ready", range(2))
    machine.send(signal.SIGTERM)
    world.find("asked", range(2))
    machine.send(signal.SIGTERM)
    assert machine.wait() == 143
    assert world.find("saved", range(2)) == ["[15]"] * 2


def test_a_save_that_takes_too_long_is_ended(world: World) -> None:
    machine = world.start(SAVES.replace("SAVE_SECONDS", "1000"), Plan(2), stop_seconds=0.5)
    world.find("ready", range(2))
    machine.send(signal.SIGTERM)
    assert machine.wait() == 1
    assert "had not saved within 0.5 s" in machine.printed
    assert world.alive() == []


def test_a_signal_before_the_training_ends_as_interrupted(world: World) -> None:
    machine = world.start(FOREVER, Plan(2))  # SIGTERM has its default action
    world.find("pid", range(2))
    machine.send(signal.SIGTERM)
    assert machine.wait(END_SECONDS) == 143
    assert "before the training began" in machine.printed


def test_interrupted_processes_of_another_machine_end_as_interrupted(world: World) -> None:
    agreeing = SAVES.replace("while not signals:", "while not signals and not list(folder.glob('saved-*')):")
    two_machines(world, agreeing.replace("signals[0]", "15").replace("SAVE_SECONDS", "0"))
    world.find("ready", range(2))
    world.machines[1].send(signal.SIGTERM)
    assert [machine.wait() for machine in world.machines] == [143, 143]


def test_a_machine_that_falls_silent_is_lost(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "LOST_SECONDS", 2)
    two_machines(world, FOREVER)
    world.find("pid", range(2))
    time.sleep(1.5)  # until it has been heard of
    world.machines[1].send(signal.SIGSTOP)
    assert world.machines[0].wait() == 1
    assert "the launcher of node 1 has not been heard of for 2 s" in world.machines[0].printed


def test_machines_started_with_different_numbers_are_refused(world: World) -> None:
    port = free_port()
    for node, nproc in enumerate((1, 2)):
        world.start(FOREVER, Plan(nproc, 2, node, "127.0.0.1", port))
    assert [machine.wait() for machine in world.machines] == [2, 2]
    assert "each machine must have the same" in world.machines[0].printed
    assert world.alive() == []


def test_a_machine_that_does_not_come_is_named(world: World) -> None:
    machine = world.start(FOREVER, Plan(1, 3, 0, "127.0.0.1", free_port()), start_seconds=0.5)
    assert machine.wait() == 2
    assert "of 3 machines, node 1, 2 did not come" in machine.printed


def test_a_port_that_is_taken_is_named(world: World) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        machine = world.start(FOREVER, Plan(1, 2, 0, "127.0.0.1", port))
        assert machine.wait() == 2
    assert f"cannot meet at 127.0.0.1:{port}" in machine.printed
