"""Which processes flags and variables ask for."""

from __future__ import annotations

import re

import pytest

from llava_core.errors import ConfigError
from llava_core.launch.plan import Flags, Plan, check_flags, plan_start
from llava_core.launch.slurm import first_host, task_variables, tasks_per_node

DEVICES = 8


def plan(environment: dict[str, str] | None = None, **flags: str | int) -> Plan:
    return plan_start(Flags(**flags), environment or {}, lambda: DEVICES)  # type: ignore[arg-type]


def test_nothing_asked_for_is_one_process() -> None:
    assert plan() == Plan(1, 1, 0)


def test_auto_is_one_process_a_device() -> None:
    assert plan(nproc="auto") == Plan(DEVICES)


def test_flags_say_all() -> None:
    found = plan(nproc="4", nnodes=3, node_rank=2, master_addr="m", master_port=5)
    assert found == Plan(4, 3, 2, "m", 5)
    assert found.size == 12


def test_several_machines_meet_at_torchruns_port() -> None:
    assert plan(nnodes=2, node_rank=1, master_addr="m").master_port == 29500


def test_flags_win_over_variables() -> None:
    environment = {
        "NPROC_PER_NODE": "8",
        "NNODES": "4",
        "NODE_RANK": "3",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
        "WORLD_SIZE": "32",
    }
    found = plan(environment, nproc="2", nnodes=2, node_rank=1, master_addr="b", master_port=2)
    assert found == Plan(2, 2, 1, "b", 2)


GUIDES = {
    "shell variables of torchrun": (
        {"GPUS_PER_NODE": "8", "MASTER_ADDR": "x", "MASTER_PORT": "29501", "NNODES": "1", "NODE_RANK": "0"}
        | {"WORLD_SIZE": "8"},
        {},
        Plan(8),
    ),
    "all processes and the machine": (
        {"WORLD_SIZE": "16", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "50000"},
        {"nproc": "auto"},
        Plan(8, 2, 1, "10.0.0.1", 50000),
    ),
    "a platform that counts machines": (
        {"WORLD_SIZE": "4", "RANK": "2", "MASTER_ADDR": "m", "MASTER_PORT": "7", "NPROC_PER_NODE": "8"},
        {},
        Plan(8, 4, 2, "m", 7),
    ),
    "the same, said twice": (
        {"WORLD_SIZE": "4", "RANK": "2", "MASTER_ADDR": "m", "MASTER_PORT": "7", "NPROC_PER_NODE": "8"}
        | {"NNODES": "4", "NODE_RANK": "2", "ADDR": "m", "PORT": "7"},
        {},
        Plan(8, 4, 2, "m", 7),
    ),
    "one machine": ({"NPROC_PER_NODE": "8"}, {}, Plan(8)),
}


@pytest.mark.parametrize("case", GUIDES)
def test_variables_that_launch_scripts_set(case: str) -> None:
    environment, flags, expected = GUIDES[case]
    assert plan(environment, **flags) == expected


def test_a_machine_alone_takes_no_meeting_place_from_variables() -> None:
    assert plan({"MASTER_ADDR": "elsewhere", "MASTER_PORT": "29500"}, nproc="2") == Plan(2, 1, 0, "127.0.0.1", 0)


WRONG = {
    "--node-rank without --nnodes": ({}, {"node_rank": 0}),
    "--master-addr, --master-port without --nnodes": ({}, {"master_addr": "m", "master_port": 1}),
    "--nnodes 2, and not which this one is": ({}, {"nnodes": 2, "master_addr": "m"}),
    "2 machines, and no place where they meet": ({}, {"nnodes": 2, "node_rank": 0}),
    "--node-rank 2, but --nnodes 2: expected 0 to 1": ({}, {"nnodes": 2, "node_rank": 2, "master_addr": "m"}),
    "NODE_RANK=1, but there is one machine": ({"NODE_RANK": "1"}, {}),
    "--nproc 0: expected": ({}, {"nproc": "0"}),
    "--nproc many: expected": ({}, {"nproc": "many"}),
    "--nnodes 0: expected 1 or more": ({}, {"nnodes": 0}),
    "--master-port 70000: expected a port": ({}, {"nnodes": 1, "master_port": 70000}),
    "NPROC_PER_NODE=x: expected a number": ({"NPROC_PER_NODE": "x"}, {}),
    "NPROC_PER_NODE=4 contradicts GPUS_PER_NODE=8": ({"NPROC_PER_NODE": "4", "GPUS_PER_NODE": "8"}, {}),
    "NODE_RANK=1 contradicts RANK=0": ({"NNODES": "2", "NODE_RANK": "1", "RANK": "0"}, {}),
    "WORLD_SIZE=7 contradicts NPROC_PER_NODE=4 and NNODES=2": (
        {"NPROC_PER_NODE": "4", "NNODES": "2", "WORLD_SIZE": "7"},
        {},
    ),
    "WORLD_SIZE=7 contradicts --nproc 4": ({"WORLD_SIZE": "7"}, {"nproc": "4"}),
    "WORLD_SIZE=8 says how many processes there are in all": ({"WORLD_SIZE": "8"}, {}),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_contradicts_itself_is_refused(message: str) -> None:
    environment, flags = WRONG[message]
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan(environment, **flags)


LAUNCHED = {"LOCAL_WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "1", "GROUP_RANK": "0", "MASTER_PORT": "5"}


def test_a_launched_process_takes_flags_that_agree() -> None:
    check_flags(Flags(nproc="4", nnodes=1, node_rank=0, master_port=5), LAUNCHED)
    check_flags(Flags(nproc="auto"), LAUNCHED)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (Flags(nproc="8"), "--nproc 8, but .*LOCAL_WORLD_SIZE=4"),
        (Flags(node_rank=1), "--node-rank 1, but .*GROUP_RANK=0"),
        (Flags(master_port=6), "--master-port 6, but .*MASTER_PORT=5"),
    ],
)
def test_a_launched_process_refuses_other_flags(flags: Flags, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_flags(flags, LAUNCHED)


STEP = {
    "SLURM_JOB_ID": "100",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_NODEID": "1",
}


def test_a_task_of_srun_is_a_process() -> None:
    assert task_variables(STEP, Flags()) == {
        "RANK": "11",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "3",
        "LOCAL_WORLD_SIZE": "8",
        "GROUP_RANK": "1",
        "GROUP_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu03",
        "MASTER_PORT": "23100",
    }


def test_a_given_meeting_place_stays() -> None:
    found = task_variables({**STEP, "MASTER_ADDR": "m", "MASTER_PORT": "1"}, Flags())
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("m", "1")
    found = task_variables({**STEP, "MASTER_ADDR": "m", "MASTER_PORT": "1"}, Flags(master_addr="f", master_port=2))
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("f", "2")


def test_a_task_a_machine_with_nproc_is_a_launcher() -> None:
    step = {**STEP, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_PROCID": "1"}
    found = task_variables(step, Flags(nproc="8"))
    assert plan({**step, **found}, nproc="8") == Plan(8, 2, 1, "gpu03", 23100)


def test_several_tasks_a_machine_and_nproc_contradict() -> None:
    with pytest.raises(ConfigError, match="--nproc 8, and srun started 8 tasks a machine already"):
        task_variables(STEP, Flags(nproc="8"))


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # a batch script
        {**STEP, "SLURM_STEP_NUM_TASKS": "1"},  # a shell that srun opened
        {**STEP, "LOCAL_RANK": "0"},  # a launcher's process
    ],
)
def test_what_srun_did_not_start_is_left_alone(environment: dict[str, str]) -> None:
    assert task_variables(environment, Flags()) == {}


@pytest.mark.parametrize(
    ("text", "expected"), [("8(x2)", [8, 8]), ("2,1", [2, 1]), ("2(x3),1", [2, 2, 2, 1]), ("4", [4])]
)
def test_tasks_per_node(text: str, expected: list[int]) -> None:
    assert tasks_per_node(text) == expected


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("gpu[03-05,9],login", "gpu03"), ("a,b", "a"), ("n1", "n1"), ("r[1-2]-ib", "r1-ib"), ("a-b.c[10,12]", "a-b.c10")],
)
def test_first_host(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_variables_of_srun_that_disagree_are_refused() -> None:
    with pytest.raises(ConfigError, match="16 tasks, of which machine 1 is one of \\[8\\]"):
        task_variables({**STEP, "SLURM_STEP_TASKS_PER_NODE": "8"}, Flags())


def test_what_cannot_be_read_is_named() -> None:
    with pytest.raises(ConfigError, match="SLURM_STEP_TASKS_PER_NODE=8x2"):
        tasks_per_node("8x2")
