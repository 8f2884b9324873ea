"""Device tensors as host tensors over the same bytes, and host results as new device tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

DEVICE_TYPE = "npu"


def on_host(value: Any) -> Any:
    """The argument as a host kernel takes it: tensors share the device's memory, devices become the host."""
    if isinstance(value, Tensor):
        return alias(value) if value.device.type == DEVICE_TYPE else value
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == DEVICE_TYPE else value
    if isinstance(value, torch.Generator):
        return None if value.device.type == DEVICE_TYPE else value
    if isinstance(value, (list, tuple)):
        return type(value)(on_host(item) for item in value)
    return value


def alias(tensor: Tensor) -> Tensor:
    """A host tensor over the device tensor's storage; valid as long as that lives."""
    storage = tensor.untyped_storage()
    num_bytes = storage.nbytes()
    if num_bytes == 0:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_char * num_bytes).from_address(storage.data_ptr())
    host_storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    result = torch.empty(0, dtype=tensor.dtype)
    return result.set_(host_storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def on_device(value: Any, device: torch.device) -> Any:
    """A host kernel's result, copied into device memory of the same strides."""
    if isinstance(value, Tensor) and device.type == DEVICE_TYPE and value.device.type == "cpu":
        result = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        alias(result).copy_(value)
        return result
    if isinstance(value, (list, tuple)):
        return type(value)(on_device(item, device) for item in value)
    return value


def device_of(values: Iterable[Any]) -> torch.device:
    """Where a kernel's result belongs: the device it is asked for, else that of its inputs, else the current one."""
    values = list(values)
    asked = next((value for value in values if isinstance(value, torch.device)), None)
    found = asked or _device_of_tensors(values)
    if found is None or (found.type == DEVICE_TYPE and found.index is None):
        return torch.device(DEVICE_TYPE, torch.npu.current_device())  # type: ignore[attr-defined]
    return found


def _device_of_tensors(values: Iterable[Any]) -> torch.device | None:
    for value in values:
        if isinstance(value, Tensor) and value.device.type == DEVICE_TYPE:
            return value.device
        if isinstance(value, (list, tuple)) and (found := _device_of_tensors(value)) is not None:
            return found
    return None
