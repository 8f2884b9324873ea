"""The processes of a run, and how their hosts agree on what no device needs to know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from torch import distributed

from llava_core.engine.hardware import HOST, Hardware
from llava_core.errors import ConfigError

T = TypeVar("T")

VARIABLES = {"rank": "RANK", "size": "WORLD_SIZE", "local_rank": "LOCAL_RANK", "local_size": "LOCAL_WORLD_SIZE"}
"""What torchrun tells each process it starts."""

HOST_GROUP = "gloo"
"""The process group in which hosts exchange objects, beside the device's own."""


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    Attributes:
        rank, size: among all.
        local_rank, local_size: among those of this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Processes:
        """What a launcher told this process; one process alone where there was none.

        Raises:
            ConfigError: it told only a part, or no numbers.
        """
        told = {field: environment[name] for field, name in VARIABLES.items() if name in environment}
        if not told:
            return cls()
        if len(told) < len(VARIABLES) or not all(value.isdecimal() for value in told.values()):
            found = ", ".join(f"{name}={environment.get(name)!r}" for name in VARIABLES.values())
            raise ConfigError(f"{found}: a launcher sets all four to numbers; start with `llava-core train --nproc N`.")
        return cls(**{field: int(value) for field, value in told.items()})

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes files and prints."""
        return self.rank == 0

    @contextmanager
    def joined(self, hardware: Hardware, timeout: timedelta) -> Iterator[None]:
        """Within, every process can talk to every other: devices by the backend's group, hosts by gloo."""
        if self.size == 1:
            yield
            return
        device_type, group = hardware.device.type, hardware.backend.dist.process_group
        groups = f"{HOST}:{HOST_GROUP}" if device_type == HOST else f"{HOST}:{HOST_GROUP},{device_type}:{group}"
        distributed.init_process_group(groups, timeout=timeout, rank=self.rank, world_size=self.size)
        try:
            yield
        finally:
            distributed.destroy_process_group()

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank. Small host objects; each process must call it as often as the others."""
        if self.size == 1:
            return [value]
        found: list[T] = [value] * self.size
        distributed.all_gather_object(found, value)
        return found
