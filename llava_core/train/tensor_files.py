"""The safetensors files of a state checkpoint: what goes into which, their bytes, and reading boxes out of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from llava_core.engine.parts import Shape
from llava_core.safetensors_header import Stored, header

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def check_storable(name: str, tensor: Tensor) -> None:
    """Raises ValueError for a tensor that a file cannot hold exactly, under this name."""
    name.encode()  # half of a surrogate pair is a ValueError here
    # A subclass (a sharded tensor, say) may hold only a part of the values; a meta tensor holds none.
    plain = type(tensor.detach()) is Tensor and tensor.layout == torch.strided and not tensor.is_meta
    if not plain or tensor.dtype not in DTYPE_NAMES or name == "__metadata__":
        raise ValueError(
            f"tensor {name!r} cannot be stored: {type(tensor).__name__}, {tensor.dtype}, {tensor.layout}, "
            f"{tensor.device}. Pass a plain dense tensor of a dtype among {', '.join(DTYPE_NAMES.values())}, "
            "under any name but '__metadata__'."
        )


def split(tensors: Mapping[str, Tensor], max_file_bytes: int) -> list[dict[str, Tensor]]:
    """The tensors of each file, in the order of their bytes; a file exceeds the limit only where one tensor does."""
    groups: list[dict[str, Tensor]] = []
    room = 0
    # Wide elements first: each tensor then starts at a multiple of its element's size, as readers that map files need.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        if not groups or tensor.nbytes > room:
            groups.append({})
            room = max_file_bytes
        groups[-1][name] = tensor
        room -= tensor.nbytes
    return groups


def file_chunks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a file; one tensor at a time is copied to the host."""
    yield header({name: Stored(DTYPE_NAMES[t.dtype], t.shape, t.nbytes) for name, t in tensors.items()})
    yield from map(_tensor_bytes, tensors.values())


def check_file(path: Path, expected: Mapping[str, tuple[str, Shape]]) -> None:
    """Raises ValueError where a file does not hold the tensors of these dtypes and shapes, or SafetensorError."""
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    if found != expected:
        differing = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise ValueError(f"it does not hold what the manifest says of {differing}")


def _tensor_bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
