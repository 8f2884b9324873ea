"""The processes of a run as a mesh, and what is summed along its axes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llava_core.engine.layout import AXES, Layout
from llava_core.engine.processes import Processes

SAMPLES = ("dp_replicate", "dp_shard", "cp")
"""The axes along which processes have different tokens."""


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

    def sum_over_samples(self, value: Tensor) -> None:
        """Add up a value, in place, over all processes with other tokens."""
        for axis in SAMPLES:
            if self.devices[axis].size() > 1:
                distributed.all_reduce(value, group=self.devices.get_group(axis))
