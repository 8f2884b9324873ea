"""How a run is spread over its processes: plain numbers, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from llava_core.config.parallel import ParallelConfig
from llava_core.errors import ConfigError

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""The mesh's axes, outermost first: neighbours in rank, which are on one machine, talk most."""


@dataclass(frozen=True)
class Layout:
    """The size of each axis of the mesh.

    Attributes:
        pipeline: stages of layers.
        replicate: whole copies of the weights.
        shard: processes over which one copy is sharded.
        context: processes that share each sequence.
        tensor: processes that share each matrix.
    """

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """By axis, in the order of `AXES`."""
        return self.pipeline, self.replicate, self.shard, self.context, self.tensor

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return prod(self.sizes)

    @property
    def sharers(self) -> int:
        """Processes that share the work of each sample."""
        return self.pipeline * self.context * self.tensor

    @property
    def data(self) -> int:
        """Processes, or groups of them, that each take samples of their own."""
        return self.replicate * self.shard

    def __str__(self) -> str:
        names = zip(("pipeline", "replicate", "shard", "context", "tensor"), self.sizes, strict=True)
        return " x ".join(f"{name} {size}" for name, size in names if size > 1) or "one process"

    @classmethod
    def of(cls, config: ParallelConfig, world_size: int) -> Layout:
        """The layout of a config: what the other axes leave is data parallel.

        Raises:
            ConfigError: the processes do not divide so.
        """
        left = world_size
        for key in ("pipeline", "tensor", "context"):
            left = divide(key, getattr(config, key), left)
        replicas = left if config.data == "replicate" else config.replicas or 1
        shard = divide("replicas", replicas, left)
        return cls(config.pipeline, replicas, shard, config.context, config.tensor)


def divide(key: str, size: int, processes: int) -> int:
    """How many groups of `size` the processes make.

    Raises:
        ConfigError: some would be left over.
    """
    if processes % size:
        raise ConfigError(
            f"parallel.{key} = {size}: {processes} processes do not divide by it; take a divisor of {processes}, or "
            "start another number of processes."
        )
    return processes // size
