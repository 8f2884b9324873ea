"""A checkpoint that was verified, and reading from it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from llava_core.durable import FileDigest, file_digest, naming, sha256
from llava_core.engine.parts import Facts, Region
from llava_core.errors import CheckpointError
from llava_core.train.manifest import MANIFEST, STATE, Manifest, parsed, read_manifest
from llava_core.train.tensor_files import DTYPES, check_file


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, whose tensors are read when they are asked for.

    Attributes:
        tensors: dtype and shape of each whole tensor.
        state: what was saved beside them.
    """

    path: Path
    manifest: Manifest
    state: dict[str, Any]
    _files: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def step(self) -> int:
        """After how many optimizer steps it was saved."""
        return self.manifest.step

    @property
    def tensors(self) -> dict[str, Facts]:
        return {name: Facts(DTYPES[tensor.dtype], tensor.shape) for name, tensor in self.manifest.tensors.items()}

    def read(self, name: str, region: Region | None = None) -> Tensor:
        """A box of a tensor, or all of it; on the host, in memory of its own. No other bytes are read.

        Raises:
            CheckpointError: the checkpoint does not hold all of it, or a file can no longer be read.
        """
        stored = self.manifest.tensors[name]
        region = region or Region.whole(stored.shape)
        found = torch.empty(region.shape, dtype=DTYPES[stored.dtype])
        missing = region.num_values
        for file, part in stored.parts:
            if overlap := part.overlap(region):
                found[overlap.within(region)] = self._slices(file, name)[overlap.within(part)]
                missing -= overlap.num_values
        if missing:
            raise CheckpointError(
                f"{self.path}: {missing} of {region.num_values} values of {name} at {region.offset} are in no file; "
                f"the whole has the shape {stored.shape}"
            )
        return found

    def _slices(self, file: str, name: str) -> Any:
        path = self.path / file
        with naming(f"{path} cannot be read"):
            if file not in self._files:
                self._files[file] = parsed(path, lambda: safe_open(path, framework="pt"))
            return parsed(path, lambda: self._files[file].get_slice(name))


def verified(path: Path, rank: int, size: int) -> Checkpoint:
    """A checkpoint of whose tensor files this one of `size` processes has verified its share.

    Raises:
        CheckpointError: something is absent, in excess or damaged; the message names the file.
    """
    manifest = read_manifest(path)
    with naming(f"{path} cannot be listed"):
        found = set(os.listdir(path)) - {MANIFEST}
    if found != manifest.files.keys():
        missing, extra = sorted(manifest.files.keys() - found), sorted(found - manifest.files.keys())
        raise CheckpointError(f"{path} does not hold what its manifest lists: missing {missing}, not listed {extra}")
    contents = manifest.contents()
    tensor_files = [name for name in manifest.files if name != STATE]
    for name in tensor_files[rank::size]:
        file = path / name
        with naming(f"{file} cannot be read"):
            _expect(file, file_digest(file), manifest)
            parsed(file, partial(check_file, file, contents.get(name, {})))
    state_file = path / STATE
    with naming(f"{state_file} cannot be read"):
        data = state_file.read_bytes()
    _expect(state_file, FileDigest(len(data), sha256(data)), manifest)
    return Checkpoint(path, manifest, parsed(state_file, lambda: json.loads(data)))


def _expect(file: Path, seen: FileDigest, manifest: Manifest) -> None:
    expected = manifest.files.get(file.name)
    if seen != expected:
        raise CheckpointError(f"{file} is damaged: it holds {seen}, the manifest expects {expected}")
