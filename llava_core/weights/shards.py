"""Writes tensors as safetensors files, one tensor in memory at a time.

The library's own writer wants a whole file's tensors at once, in host memory and in their final dtype: for a file of
5 GB that is 5 GB more.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from llava_core.errors import WeightsError
from llava_core.safetensors_header import Stored, header

DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor that is fetched when its turn comes."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    def num_bytes(self, dtype: torch.dtype) -> int:
        return torch.Size(self.shape).numel() * dtype.itemsize


def whole_tensor(weight: Tensor) -> Tensor:
    """A weight that is spread over processes, put together in each of them; another one as it is."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def write_weights(
    folder: Path, tensors: Mapping[str, TensorToWrite], dtype: torch.dtype, *, max_file_bytes: int
) -> None:
    """`model.safetensors`, or numbered files and their index where one would exceed `max_file_bytes`.

    Each tensor is read once, in the mapping's order. A single tensor may exceed the limit.

    Raises:
        WeightsError: a dtype that exports do not have, or a tensor of another shape than was announced.
    """
    if dtype not in DTYPE_NAMES:
        raise WeightsError(f"an export in {dtype} is not possible; choose one of {', '.join(map(str, DTYPE_NAMES))}.")
    groups = _split(tensors, dtype, max_file_bytes)
    names = ["model.safetensors"]
    if len(groups) > 1:
        names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
        index = {
            "metadata": {"total_size": sum(t.num_bytes(dtype) for t in tensors.values())},
            "weight_map": {name: file for file, group in zip(names, groups, strict=True) for name in group},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for file, group in zip(names, groups, strict=True):
        write_tensors(folder / file, {name: tensors[name] for name in group}, dtype)


def _split(tensors: Mapping[str, TensorToWrite], dtype: torch.dtype, max_file_bytes: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    used = 0
    for name, tensor in tensors.items():
        size = tensor.num_bytes(dtype)
        if groups[-1] and used + size > max_file_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups


def write_tensors(path: Path, tensors: Mapping[str, TensorToWrite], dtype: torch.dtype) -> None:
    """One file, durable; each tensor is read once, in the mapping's order."""
    with path.open("xb") as file:
        stored = {name: Stored(DTYPE_NAMES[dtype], t.shape, t.num_bytes(dtype)) for name, t in tensors.items()}
        file.write(header(stored, {"format": "pt"}))
        for name, tensor in tensors.items():
            value = tensor.read()
            if tuple(value.shape) != tensor.shape:
                raise WeightsError(f"{name} has the shape {tuple(value.shape)}, expected {tensor.shape}.")
            file.write(_bytes(value, dtype))
        file.flush()
        os.fsync(file.fileno())


def _bytes(tensor: Tensor, dtype: torch.dtype) -> memoryview:
    return tensor.detach().to("cpu", dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data
