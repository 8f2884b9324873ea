"""Who writes what: the boxes that processes hold, each given to one of them and written to its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from llava_core.durable import FileDigest, write_file
from llava_core.engine.parts import Part, Region, Shape, tiles
from llava_core.train.manifest import Manifest, StoredTensor
from llava_core.train.tensor_files import DTYPE_NAMES, check_storable, file_chunks


@dataclass(frozen=True)
class Held:
    """What one process holds of a tensor."""

    dtype: str
    shape: Shape
    region: Region


@dataclass(frozen=True)
class Shared:
    """A tensor, and which process writes each of its boxes."""

    dtype: str
    shape: Shape
    writers: dict[Region, int]


@dataclass(frozen=True)
class Written:
    """What one process wrote: its files, and the one in which each tensor's box is."""

    files: dict[str, FileDigest]
    places: dict[str, str]


def held_by(parts: Mapping[str, Part]) -> dict[str, Held]:
    for name, part in parts.items():
        check_storable(name, part.data)
    return {name: Held(DTYPE_NAMES[part.data.dtype], part.shape, part.region) for name, part in parts.items()}


def share_out(held: Sequence[Mapping[str, Held]]) -> dict[str, Shared]:
    """Each box to the first process that holds it. Raises ValueError for boxes that do not make up whole tensors."""
    shared: dict[str, Shared] = {}
    for rank, tensors in enumerate(held):
        for name, part in tensors.items():
            tensor = shared.setdefault(name, Shared(part.dtype, part.shape, {}))
            if (tensor.dtype, tensor.shape) != (part.dtype, part.shape):
                raise ValueError(
                    f"process {rank} has {name!r} as {part.dtype} {part.shape}, one before it as {tensor.dtype} "
                    f"{tensor.shape}: a name must be one tensor's"
                )
            if part.region.num_values:
                tensor.writers.setdefault(part.region, rank)
    for name, tensor in shared.items():
        if not tiles(tensor.writers, tensor.shape):
            boxes = [(region.offset, region.shape) for region in tensor.writers]
            raise ValueError(f"the parts of {name!r} do not make up a tensor of shape {tensor.shape} once: {boxes}")
    return shared


def write_share(partial: Path, rank: int, groups: Sequence[Mapping[str, Tensor]]) -> Written:
    """Write and fsync the files of one process."""
    written = Written({}, {})
    for number, tensors in enumerate(groups, 1):
        file = f"tensors-{rank:05d}-{number:05d}.safetensors"
        written.files[file] = write_file(partial / file, file_chunks(tensors))
        written.places.update(dict.fromkeys(tensors, file))
    return written


def manifest_of(step: int, shared: Mapping[str, Shared], written: Sequence[Written]) -> Manifest:
    """Of all tensor files."""
    files = {name: digest for process in written for name, digest in process.files.items()}
    tensors = {
        name: StoredTensor(
            tensor.dtype,
            tensor.shape,
            tuple((written[rank].places[name], region) for region, rank in tensor.writers.items()),
        )
        for name, tensor in sorted(shared.items())
    }
    return Manifest(step, files, tensors)
