"""The norm of all gradients, wherever their shards are, and clipping by it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm


def global_norm(parameters: Iterable[nn.Parameter], device: torch.device, *, stages: int = 1) -> Tensor:
    """The L2 norm of the gradients of all processes' parameters, each element counted once; fp32, on every process.

    Plain gradients and DTensors of any mesh may be mixed. What a process has of a gradient is one of so many shards,
    and each shard is on equally many processes of the stage: so the squares are summed over all processes, each
    divided by how often it is counted. One number is exchanged; every process must call, also one without gradients.
    Gradients may be on the host; the exchange is between devices.

    Args:
        parameters: those of this process; what must be summed over processes in their gradients is summed already.
        stages: groups of equally many processes that have parameters of their own, and no others.
    """
    shards: dict[int, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            shards.setdefault(_num_shards(parameter.grad), []).append(_local(parameter.grad))
    norms = {count: get_total_norm(gradients) for count, gradients in shards.items()}
    if not distributed.is_initialized():
        return norms.get(1, torch.zeros((), device=device))  # alone nothing is sharded, and squaring would round
    total = torch.zeros((), device=device)
    for count, norm in norms.items():
        total += norm.to(device).float().square() * (count * stages / distributed.get_world_size())
    distributed.all_reduce(total)
    return total.sqrt()


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, limit: float) -> None:
    """Scale gradients whose global norm is `norm`, in place, so that it is at most `limit`; gradients that are on the
    device do not wait for it."""
    gradients = [_local(p.grad) for p in parameters if p.grad is not None]
    if gradients:
        # The formula of torch's own clipping, which takes no mixture of plain gradients and DTensors.
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0).to(gradients[0].device))


def _num_shards(gradient: Tensor) -> int:
    if not isinstance(gradient, DTensor):
        return 1
    assert not any(placement.is_partial() for placement in gradient.placements), "gradients are reduced before"
    sizes = zip(gradient.placements, gradient.device_mesh.shape, strict=True)
    count = 1
    for placement, size in sizes:
        count *= 1 if placement.is_replicate() else size
    return count


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
