"""The start of a safetensors file, for those that are written a piece at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Stored(NamedTuple):
    """A tensor of a file: its type as safetensors calls it, its shape, and how many bytes it takes."""

    dtype: str
    shape: Sequence[int]
    num_bytes: int


def header(tensors: Mapping[str, Stored], metadata: Mapping[str, str] | None = None) -> bytes:
    """What comes before the tensors' bytes, which follow in the same order: the length of a JSON text as 8
    little-endian bytes, and that text, padded so that the tensors start at a multiple of 8, as readers that map files
    need.

    The library's own writer wants a whole file in host memory, contiguous and without shared storage. Source of the
    form: the format section of the safetensors README.
    """
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape, num_bytes) in tensors.items():
        start, end = end, end + num_bytes
        entries[name] = {"dtype": dtype, "shape": [int(size) for size in shape], "data_offsets": [start, end]}
    text = json.dumps(entries, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
