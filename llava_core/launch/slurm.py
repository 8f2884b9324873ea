"""What srun tells each task, in the words of a launcher. Names and forms: srun(1), "output environment variables"."""

from __future__ import annotations

import re
from collections.abc import Mapping

from llava_core.errors import ConfigError
from llava_core.launch.plan import Flags

FIRST_PORT, NUM_PORTS = 20000, 10000
"""Below the ports that Linux gives to outgoing connections."""


def task_variables(environment: Mapping[str, str], flags: Flags) -> dict[str, str]:
    """The variables to add for this task; none where srun started no more than one, or something below it launched.

    One task a device: each becomes a process of the run. One task a machine, with --nproc: each starts that many.

    Raises:
        ConfigError: several tasks a machine and --nproc, or a step whose variables are not all there.
    """
    size = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "1")
    # A batch script and the shell of an allocation have SLURM_NTASKS too, but are no step of tasks.
    if "SLURM_STEP_ID" not in environment or size == "1" or "LOCAL_RANK" in environment:
        return {}
    per_node = tasks_per_node(_one_of(environment, "SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"))
    meeting = {
        "MASTER_ADDR": flags.master_addr
        or environment.get("MASTER_ADDR")
        or first_host(_one_of(environment, "SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST")),
        "MASTER_PORT": str(flags.master_port or environment.get("MASTER_PORT") or _port(environment)),
    }
    if flags.nproc is not None or "NPROC_PER_NODE" in environment:
        if max(per_node) > 1:
            told = f"--nproc {flags.nproc}" if flags.nproc else f"NPROC_PER_NODE={environment['NPROC_PER_NODE']}"
            raise ConfigError(
                f"{told}, and srun started {max(per_node)} tasks a machine already: use --ntasks-per-node=1 to have "
                "each start that many, or leave it out to make each task one process."
            )
        return {"NNODES": size, "NODE_RANK": _one_of(environment, "SLURM_PROCID"), **meeting}
    node = int(_one_of(environment, "SLURM_NODEID"))
    if sum(per_node) != int(size) or node >= len(per_node):
        raise ConfigError(f"{size} tasks, of which machine {node} is one of {per_node}: srun's variables disagree.")
    return {
        "RANK": _one_of(environment, "SLURM_PROCID"),
        "WORLD_SIZE": size,
        "LOCAL_RANK": _one_of(environment, "SLURM_LOCALID"),
        "LOCAL_WORLD_SIZE": str(per_node[node]),
        "GROUP_RANK": str(node),
        "GROUP_WORLD_SIZE": str(len(per_node)),
        **meeting,
    }


def tasks_per_node(text: str) -> list[int]:
    """`2(x3),1` is [2, 2, 2, 1]."""
    counts = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE={text}: expected numbers such as 8(x2),4.")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def first_host(nodes: str) -> str:
    """`gpu[03-05,9],login` is gpu03; a name may have text after the brackets."""
    match = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodes)
    if match is None:
        raise ConfigError(f"SLURM_STEP_NODELIST={nodes}: expected names such as node[01-04].")
    return match[1] + (match[2] or "") + (match[3] or "")


def _port(environment: Mapping[str, str]) -> int:
    """The same for every task of a step, and another for most steps that share a machine."""
    job, step = _one_of(environment, "SLURM_JOB_ID"), environment["SLURM_STEP_ID"]
    return FIRST_PORT + (int(job) * 31 + int(step)) % NUM_PORTS


def _one_of(environment: Mapping[str, str], *names: str) -> str:
    for name in names:
        if environment.get(name):
            return environment[name]
    raise ConfigError(f"srun started {environment.get('SLURM_STEP_NUM_TASKS')} tasks without setting {names[0]}.")
