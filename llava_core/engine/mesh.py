"""The processes of a run as a mesh, and what is summed along its axes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llava_core.engine.layout import AXES, Layout
from llava_core.engine.processes import Processes

T = TypeVar("T")

ADDENDS = ("pp", "dp_replicate", "dp_shard", "cp")
"""The axes along which processes have parts of the loss: of other tokens, or none where another has the last stage."""


@dataclass(frozen=True)
class Mesh:
    """The processes of a run on its layout.

    Attributes:
        devices: PyTorch's mesh over `AXES`; its groups are ready.
    """

    processes: Processes
    layout: Layout
    devices: DeviceMesh

    @classmethod
    def build(cls, processes: Processes, layout: Layout, device_type: str) -> Mesh:
        """The mesh; every process of the run must call it, joined to the others."""
        return cls(processes, layout, init_device_mesh(device_type, layout.sizes, mesh_dim_names=AXES))

    @property
    def data_index(self) -> int:
        """Which share of the samples this process takes."""
        return self.devices.get_local_rank("dp_replicate") * self.layout.shard + self.devices.get_local_rank("dp_shard")

    def own_stages(self, stages: Sequence[T]) -> Sequence[T]:
        """Those of a pipeline's stages that this process has: its processes take turns."""
        return stages[self.devices.get_local_rank("pp") :: self.layout.pipeline]

    @property
    def weights(self) -> DeviceMesh:
        """The axes over which parameters are shared, and their gradients summed: replicas, where there are any, and
        shards, of which processes that share sequences have one each."""
        shards = "dp_shard"
        if self.layout.context > 1:
            shards = "dp_shard_cp"
            # There is no public way to make two axes one; torch's own documentation of it is this function's.
            self.devices["dp_shard", "cp"]._flatten(shards)
        # By name, which torch 2.13 has another, private way for; it warns, and older ones have no other.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Slicing a flattened dim")
            return self.devices[shards] if self.layout.replicate == 1 else self.devices["dp_replicate", shards]

    def sum_losses(self, value: Tensor) -> None:
        """Add up a loss, in place, over all processes that have a part of it."""
        for axis in ADDENDS:
            if self.devices[axis].size() > 1:
                distributed.all_reduce(value, group=self.devices.get_group(axis))
