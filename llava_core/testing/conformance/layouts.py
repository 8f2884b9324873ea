"""The same values laid out in memory as a careless kernel would not expect them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llava_core.backend import MaskSpec
from llava_core.testing.conformance.subject import Subject

MARGIN = 4096
"""Poisoned elements before and after a guarded tensor: a kernel's whole tile past the end still lands among them, and
the tensor itself starts at a multiple of 512 bytes, as from an allocator."""


def poison(dtype: torch.dtype, *, infinite: bool) -> float | int | bool:
    """A value that no sum, product or comparison hides; for whole numbers, an index far outside every tensor."""
    if dtype.is_floating_point:
        return float("inf") if infinite else float("nan")
    if dtype == torch.bool:
        return infinite
    return 2**30 if infinite else -(2**30)


def guarded(x: Tensor, *, infinite: bool) -> Tensor:
    """A contiguous copy in the middle of a poisoned buffer."""
    buffer = torch.full((x.numel() + 2 * MARGIN,), poison(x.dtype, infinite=infinite), dtype=x.dtype, device=x.device)
    middle = buffer[MARGIN : MARGIN + x.numel()].view(x.shape)
    return middle.copy_(x)


def sliced(x: Tensor) -> Tensor:
    """A copy whose rows are part of wider, poisoned rows, as a projection of queries, keys and values at once gives."""
    wide = torch.full((*x.shape[:-1], 3 * x.shape[-1]), poison(x.dtype, infinite=False), dtype=x.dtype, device=x.device)
    return wide[..., x.shape[-1] : 2 * x.shape[-1]].copy_(x)


def reversed_dims(x: Tensor) -> Tensor:
    """A copy whose memory runs through the dims in the opposite order."""
    order = list(reversed(range(x.ndim)))
    return x.permute(order).contiguous().permute(order)


def relaid(subject: Subject, inputs: list[Any], layout: Callable[[Tensor], Tensor], *, masks: bool) -> list[Any]:
    """The host's inputs on the device, each tensor laid out by `layout`; a mask's own tensors only with `masks`."""

    def lay(value: Any) -> Any:
        if isinstance(value, Tensor):
            return layout(value.to(subject.device)) if value.ndim else value.to(subject.device)
        if isinstance(value, MaskSpec):
            moved = value.to(subject.device)
            return _relaid_mask(moved, layout) if masks else moved
        return value

    return [lay(value) for value in inputs]


def _relaid_mask(mask: MaskSpec, layout: Callable[[Tensor], Tensor]) -> MaskSpec:
    return replace(
        mask,
        cu_seqlens=None if mask.cu_seqlens is None else layout(mask.cu_seqlens),
        key_valid=None if mask.key_valid is None else layout(mask.key_valid),
    )
