"""What the processes of a run would tell each other in a step: listed where it would be sent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils._pytree import tree_leaves

from llava_core.engine.layout import AXES
from llava_core.engine.mesh import Mesh

NAMES = {
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
    "send": "send",
    "recv_": "receive",
}
"""The kinds by torch's names; others are called as torch calls them."""

HANDSHAKE_BYTES = 8
"""As each step begins, a pipeline's neighbours send each other a number, which is not listed; what else they send is
larger."""

ALL = "all"
"""The axis of what all processes do together."""


@dataclass(frozen=True)
class Collective:
    """Exchanges of one kind within one axis of the mesh.

    Attributes:
        processes: how many take part in each.
        num_bytes: of all together: of the whole tensor, whose parts are gathered, added or handed out.
    """

    kind: str
    axis: str
    processes: int
    count: int
    num_bytes: int


@dataclass(frozen=True)
class _Sent:
    kind: str
    axis: str
    processes: int
    num_bytes: int
    micro_batch: int


class CollectiveLog:
    """Every exchange of a step, in order.

    Attributes:
        micro_batch: how many micro-batches of the step have begun.
    """

    def __init__(self, mesh: Mesh | None) -> None:
        self._axes = _axes_by_group(mesh) if mesh is not None else {}
        self._sent: list[_Sent] = []
        self.micro_batch = 0

    def start(self) -> None:
        """Of a new step."""
        self._sent.clear()
        self.micro_batch = 0

    def note(self, operation: torch._ops.OpOverload, arguments: Sequence[Any]) -> tuple[str, str]:
        """An exchange; its kind and axis."""
        name = operation._opname
        group = next(distributed.ProcessGroup.unbox(a) for a in arguments if isinstance(a, torch.ScriptObject))
        axis = self._axes[group.group_name]
        tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
        # Of what is gathered and of its parts, the whole is the larger.
        num_bytes = max((tensor.nbytes for tensor in tensors), default=0)
        kind = NAMES.get(name, name.strip("_"))
        if kind in ("send", "receive") and num_bytes <= HANDSHAKE_BYTES:
            return kind, axis
        self._sent.append(_Sent(kind, axis, group.size(), num_bytes, self.micro_batch))
        return kind, axis

    def of_step(self, left_out: int) -> list[Collective]:
        """The exchanges of a step with so many more micro-batches than were gone through, all like the first.

        Only the last may differ: replicas add up their gradients in the last alone.
        """
        counts: Counter[tuple[str, str, int]] = Counter()
        sizes: Counter[tuple[str, str, int]] = Counter()
        for sent in self._sent:
            key = sent.kind, sent.axis, sent.processes
            times = 1 + left_out if sent.micro_batch == 1 else 1
            counts[key] += times
            sizes[key] += times * sent.num_bytes
        return [Collective(*key, count, sizes[key]) for key, count in sorted(counts.items())]


def _axes_by_group(mesh: Mesh) -> Mapping[str, str]:
    world = distributed.group.WORLD
    assert world is not None
    names: dict[str, str] = {world.group_name: ALL}
    weights = mesh.weights
    for devices, axes in ((weights, weights.mesh_dim_names or ()), (mesh.devices, AXES)):
        names |= {devices.get_group(axis).group_name: axis for axis in axes}
    return names
