"""What the processes that share each matrix tell each other of their activations, differentiably.

Plain tensors in, plain tensors out, so that kernels never see anything else.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

WHOLE = Replicate()
"""Every process has the whole tensor; of a gradient: every process has the whole gradient already."""

ADDEND = Partial()
"""The tensor is the sum of what the processes have."""

TOKENS = Shard(1)
"""Each process has its own tokens of [B, T, …], as many as every other."""

IMAGES = Shard(0)
"""Each process has its own images of [I, …], as many as every other."""


def exchange(
    x: Tensor, mesh: DeviceMesh, have: Placement, want: Placement, gradient: Placement | None = None
) -> Tensor:
    """What `x` is on each process, `have`, becomes `want`; the backward pass goes the other way.

    Args:
        mesh: of one axis.
        gradient: what the result's gradient will be on each process; as `want`, if not given.
    """
    whole = DTensor.from_local(x, mesh, (have,), run_check=False).redistribute(placements=(want,))
    return whole.to_local(grad_placements=(want if gradient is None else gradient,))


def add_gradients(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """`x` itself, which every process has and uses for its own part of a result: their gradients are added."""
    return exchange(x, mesh, WHOLE, WHOLE, gradient=ADDEND)
