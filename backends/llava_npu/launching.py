"""What a launcher sets for each process that drives an NPU. Pure functions, tested without one."""

from __future__ import annotations

from collections.abc import Mapping

from llava_core.backend import World
from llava_core.errors import BackendUnavailable
from llava_npu.probing import VISIBLE, describe_visible, visible_devices

ALLOCATOR = "PYTORCH_NPU_ALLOC_CONF"
ALLOCATOR_OF_ANY_DEVICE = "PYTORCH_ALLOC_CONF"
CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"

SETTINGS: Mapping[str, str] = {
    # Dispatches operators from a second thread, their workspace's allocation included. torch_npu turns it off by
    # itself under ASCEND_LAUNCH_BLOCKING=1.
    "TASK_QUEUE_ENABLE": "2",
    # Ranks read weights from disk at different speeds before they first meet; HCCL's own 120 s is too short for that.
    "HCCL_CONNECT_TIMEOUT": "1800",
    # Micro-batches differ in length, which fragments an allocator whose segments cannot grow.
    ALLOCATOR: "expandable_segments:True",
}

SHARED_MACHINE: Mapping[str, str] = {
    # Each process to the cores near its device: otherwise the dispatching threads of all processes wander.
    "CPU_AFFINITY_CONF": "1",
}


def launch_env(world: World, environment: Mapping[str, str]) -> dict[str, str]:
    """The settings to add for each process of `world`; what `environment` has is kept.

    Raises:
        BackendUnavailable: the visible devices are not in ascending order, are too few, or a setting forbids FSDP.
    """
    check_visible(world, environment)
    if environment.get(CONNECTIONS) == "1":
        raise BackendUnavailable(
            f"{CONNECTIONS}=1 serialises the copies and sums that sharded training overlaps, and torch_npu obeys it: "
            "unset it."
        )
    settings = {**SETTINGS, **(SHARED_MACHINE if world.local_size > 1 else {})}
    if ALLOCATOR_OF_ANY_DEVICE in environment:
        del settings[ALLOCATOR]  # torch_npu refuses to start with both
    return {name: value for name, value in settings.items() if name not in environment}


def check_visible(world: World, environment: Mapping[str, str]) -> None:
    """Raises BackendUnavailable where the user's choice of devices does not serve `world`."""
    chosen = environment.get(VISIBLE)
    if chosen is None:
        return
    numbers = visible_devices(chosen)
    if numbers is None or list(numbers) != sorted(set(numbers)):
        raise BackendUnavailable(f"{VISIBLE}={chosen!r}: the runtime would list no device; {describe_visible(chosen)}.")
    if len(numbers) < world.local_size:
        raise BackendUnavailable(
            f"{VISIBLE}={chosen!r} shows {len(numbers)} device(s) to {world.local_size} processes: start at most "
            f"{len(numbers)}, or name more devices."
        )
