"""What the processes that share each matrix tell each other of their activations, differentiably.

Plain tensors in, plain tensors out, so that kernels never see anything else. DTensors could do the same, but take the
host two to five times as long, which shows where a process's share of a layer is small.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, distributed
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Placement, Replicate, Shard

# torch 2.13 has new names for the same functions and warns of the old ones; remove when no older torch is supported.
_new = hasattr(distributed, "all_gather_single")
all_gather = distributed.all_gather_single if _new else distributed.all_gather_into_tensor
reduce_scatter = distributed.reduce_scatter_single if _new else distributed.reduce_scatter_tensor

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
    moved: Tensor = _Exchange.apply(x, mesh, have, want, want if gradient is None else gradient)
    return moved


def add_gradients(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """`x` itself, which every process has and uses for its own part of a result: their gradients are added."""
    return exchange(x, mesh, WHOLE, WHOLE, gradient=ADDEND)


class _Exchange(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh, have: Placement, want: Placement, gradient: Placement) -> Tensor:
        # Every process gets the whole gradient of a sum's addend.
        ctx.mesh, ctx.have, ctx.want = mesh, gradient, WHOLE if have == ADDEND else have
        return _move(x, mesh, have, want)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _move(grad, ctx.mesh, ctx.have, ctx.want), None, None, None, None


def _move(x: Tensor, mesh: DeviceMesh, have: Placement, want: Placement) -> Tensor:
    group, size = mesh.get_group(), mesh.size()
    if have == want:
        return x.view_as(x)
    if isinstance(want, Shard):
        rows = x.movedim(want.dim, 0)
        assert len(rows) % size == 0, f"{len(rows)} rows for {size} processes"
        if have == WHOLE:
            return rows.chunk(size)[mesh.get_local_rank()].movedim(0, want.dim).contiguous()
        own = rows.new_empty(len(rows) // size, *rows.shape[1:])
        reduce_scatter(own, rows.contiguous(), group=group)
        return own.movedim(0, want.dim)
    if isinstance(have, Shard):
        rows = x.movedim(have.dim, 0).contiguous()
        every = rows.new_empty(size * len(rows), *rows.shape[1:])
        all_gather(every, rows, group=group)
        return every.movedim(0, have.dim)
    assert (have, want) == (ADDEND, WHOLE)
    total = x.contiguous().clone()
    distributed.all_reduce(total, group=group)
    return total
