"""Which part of a tensor a process holds: plain boxes, whatever laid the tensor out."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Region:
    """A box of values within a tensor: its first corner and its size."""

    offset: Shape
    shape: Shape

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Region:
        """All of a tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def num_values(self) -> int:
        return prod(self.shape)

    @property
    def end(self) -> Shape:
        """The corner behind the last value."""
        return tuple(start + size for start, size in zip(self.offset, self.shape, strict=True))

    def overlap(self, other: Region) -> Region | None:
        """What both hold; None for nothing."""
        start = tuple(map(max, self.offset, other.offset))
        shape = tuple(end - first for first, end in zip(start, map(min, self.end, other.end), strict=True))
        return Region(start, shape) if all(size > 0 for size in shape) else None

    def within(self, outer: Region) -> tuple[slice, ...]:
        """Where this lies in a tensor that holds `outer` alone."""
        return tuple(
            slice(first - base, end - base)
            for first, end, base in zip(self.offset, self.end, outer.offset, strict=True)
        )


@dataclass(frozen=True)
class Facts:
    """What is known of a whole tensor without reading it."""

    dtype: torch.dtype
    shape: Shape


@dataclass(frozen=True)
class Part:
    """The values of a box.

    Attributes:
        data: the values.
        offset: the box's first corner in the whole tensor.
        shape: of the whole tensor.
    """

    data: Tensor
    offset: Shape
    shape: Shape

    @property
    def region(self) -> Region:
        return Region(self.offset, tuple(self.data.shape))


def tiles(regions: Iterable[Region], shape: Sequence[int]) -> bool:
    """Whether the regions, none of them empty, hold each value of a tensor of this shape once."""
    regions = list(regions)
    if not regions or 0 in shape:
        return not regions and 0 in shape
    # The regions' edges cut the tensor into cells, each of which lies wholly in a region or outside of it.
    edges = [
        sorted({edge for region in regions for edge in (region.offset[dim], region.end[dim])})
        for dim in range(len(shape))
    ]
    if any((cuts[0], cuts[-1]) != (0, size) for cuts, size in zip(edges, shape, strict=True)):
        return False
    counts = torch.zeros([len(cuts) - 1 for cuts in edges], dtype=torch.int64)
    for region in regions:
        corners = zip(edges, region.offset, region.end, strict=True)
        counts[tuple(slice(bisect_left(cuts, first), bisect_left(cuts, end)) for cuts, first, end in corners)] += 1
    return bool((counts == 1).all())


def local_part(tensor: Tensor) -> Part:
    """What this process holds of a tensor: all of a plain one, its own box of a distributed one."""
    if not isinstance(tensor, DTensor):
        return Part(tensor.detach(), (0,) * tensor.dim(), tuple(tensor.shape))
    # What torch's own checkpoints ask, for want of a public name: it knows every placement, FSDP's over TP's too.
    (chunk,) = tensor.__create_chunk_list__()
    local = tensor.to_local().detach()
    assert tuple(local.shape) == tuple(chunk.sizes), f"{tuple(local.shape)} held, {tuple(chunk.sizes)} expected"
    return Part(local, tuple(chunk.offsets), tuple(tensor.shape))


def local_parts(tensors: Mapping[str, Tensor]) -> dict[str, Part]:
    """What this process holds of each tensor."""
    return {name: local_part(tensor) for name, tensor in tensors.items()}


def laid_out_like(tensor: Tensor, local: Tensor) -> Tensor:
    """The tensor of which this process holds `local`, laid out as `tensor` is."""
    if not isinstance(tensor, DTensor):
        return local
    if local.device.type != tensor.device_mesh.device_type:
        # Kept on the host for the mesh's devices: `from_local` would move it to them.
        laid_out = torch.empty_like(tensor, dtype=local.dtype, device=local.device)
        local_part(laid_out).data.copy_(local)
        return laid_out
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
