"""Keeps activations in the host's memory between the forward and the backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llava_core.engine.hardware import HOST, Hardware
from llava_core.engine.kept import Store


def on_host(hardware: Hardware) -> Store:
    """Copies a tensor of the device to the host, and back when it is asked for.

    Where host memory can be pinned the host does not wait: the device makes both copies in their turn among all else
    that it was asked to do, so that a copy has read a tensor before its memory is used again.
    """
    pinned, device = hardware.backend.pins_memory, hardware.device

    def store(tensor: Tensor) -> Callable[[], Tensor]:
        kept = torch.empty(tensor.shape, dtype=tensor.dtype, device=HOST, pin_memory=pinned)
        kept.copy_(tensor, non_blocking=pinned)
        return lambda: kept.to(device, non_blocking=pinned)

    return store
