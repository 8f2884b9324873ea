"""How a run is spread over its processes: plain numbers, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from llava_core.config.schema import ParallelConfig
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
    def data(self) -> int:
        """Processes, or groups of them, that each take samples of their own."""
        return self.replicate * self.shard

    @classmethod
    def of(cls, config: ParallelConfig, world_size: int) -> Layout:
        """The layout of a config: what the other axes leave is data parallel.

        Raises:
            ConfigError: the processes do not divide so.
        """
        if config.replicas is None:
            replicate, shard = (world_size, 1) if config.data == "replicate" else (1, world_size)
            return cls(replicate=replicate, shard=shard)
        if world_size % config.replicas:
            raise ConfigError(
                f"parallel.replicas = {config.replicas}: {world_size} processes do not divide into so many groups of "
                f"one size; take a divisor of {world_size}."
            )
        return cls(replicate=config.replicas, shard=world_size // config.replicas)
