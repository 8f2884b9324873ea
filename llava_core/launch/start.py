"""Whether this process trains, or starts those that do."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from llava_core.backend import Backend, World
from llava_core.config import RunConfig
from llava_core.engine.hardware import HOST, choose_backend
from llava_core.engine.processes import Processes
from llava_core.errors import BackendUnavailable
from llava_core.launch.plan import LAUNCHED, Flags, check_flags, plan_start
from llava_core.launch.ranks import end_with_launcher
from llava_core.launch.slurm import task_variables
from llava_core.launch.supervise import launch
from llava_core.plugins import Registry

LOGS_FOLDER = "logs"


def start(config: RunConfig, flags: Flags, again: Sequence[str], *, stop_seconds: float) -> int:
    """Train as one of the processes that were launched, or as the only one; else launch them. The exit code.

    Args:
        again: the arguments of `llava-core` for the processes that this one starts.
        stop_seconds: how long they may take to save when they are asked to stop.

    Raises:
        LlavaError: what is asked for cannot be started, or whatever stops the run.
    """
    os.environ.update(task_variables(os.environ, flags))
    if LAUNCHED in os.environ:
        return be_launched(config, flags)
    plan = plan_start(flags, os.environ, lambda: len(type(chosen_backend(config)).probe().devices))
    if plan.size == 1:
        return train(config, Processes())
    command = [sys.executable, "-m", "llava_core", *again]
    environment = {**os.environ, **launch_variables(config, World(plan.nproc, plan.nnodes))}
    return launch(command, plan, environment, config.output / LOGS_FOLDER, stop_seconds=stop_seconds)


def be_launched(config: RunConfig, flags: Flags) -> int:
    """Train as one of the processes that this project's launcher, torchrun or srun started. Raises as `start`."""
    end_with_launcher(os.environ)
    check_flags(flags, os.environ)
    processes = Processes.of(os.environ)
    world = World(processes.local_size, processes.size // processes.local_size)
    # Nothing new where this project's launcher has set them; torchrun and srun know of no backend.
    os.environ.update(launch_variables(config, world))
    return train(config, processes)


def train(config: RunConfig, processes: Processes) -> int:
    """Train in this process, one of `processes`, which then ends."""
    from llava_core.train.loop import train_model

    return train_model(config, processes=processes, ends_process=True).exit_code


def chosen_backend(config: RunConfig) -> Backend:
    """The backend that the run will take. Raises as `choose_backend`."""
    return choose_backend(config.backend.name, Registry.discover())


def launch_variables(config: RunConfig, world: World) -> dict[str, str]:
    """What the backend wants each process of `world` to have in its environment.

    Raises:
        BackendUnavailable: this machine has fewer devices than processes.
    """
    backend = chosen_backend(config)
    if backend.name != HOST:  # whose cores any number of processes share
        check_devices(backend.name, world.local_size, len(type(backend).probe().devices))
    return dict(type(backend).launch_env(world, os.environ))


def check_devices(backend: str, num_processes: int, num_devices: int) -> None:
    """Raises BackendUnavailable where processes of one machine would have to share a device."""
    if num_processes > num_devices:
        raise BackendUnavailable(
            f"{num_processes} processes, and backend {backend!r} has {num_devices} device(s) here, one for each "
            f"process: start at most {num_devices}, or one per device with --nproc auto."
        )
