"""The manifest of a state checkpoint: what its files must hold, and which part of which tensor lies where."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from llava_core.durable import FileDigest, naming, sha256
from llava_core.engine.parts import Region, Shape
from llava_core.errors import CheckpointError

T = TypeVar("T")

FORMAT = 2
MANIFEST = "manifest.json"
STATE = "state.json"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor over all files.

    Attributes:
        dtype: as safetensors calls it.
        shape: of the whole.
        parts: the file that holds each box, under the tensor's name.
    """

    dtype: str
    shape: Shape
    parts: tuple[tuple[str, Region], ...]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of."""

    step: int
    files: Mapping[str, FileDigest]
    tensors: Mapping[str, StoredTensor]

    def encode(self) -> bytes:
        """Its first line is the hash of the rest."""
        body = {
            "format": FORMAT,
            "step": self.step,
            "files": {name: asdict(digest) for name, digest in self.files.items()},
            "tensors": {name: _encoded(tensor) for name, tensor in self.tensors.items()},
        }
        tail = b'"manifest": ' + json.dumps(body, indent=1).encode() + b"}\n"
        return seal(tail) + tail

    def contents(self) -> dict[str, dict[str, tuple[str, Shape]]]:
        """By file, dtype and shape of each tensor in it."""
        found: dict[str, dict[str, tuple[str, Shape]]] = {}
        for name, tensor in self.tensors.items():
            for file, region in tensor.parts:
                found.setdefault(file, {})[name] = tensor.dtype, region.shape
        return found


def read_manifest(folder: Path) -> Manifest:
    """What a checkpoint must hold.

    Raises:
        CheckpointError: the manifest is absent, damaged, or another checkpoint's.
    """
    file = folder / MANIFEST
    with naming(f"{folder} is no complete checkpoint"):
        raw = file.read_bytes()
    head, newline, tail = raw.partition(b"\n")
    if head + newline != seal(tail):
        raise CheckpointError(f"{file} is damaged: its {len(raw)} bytes do not match the hash on its first line")
    body = parsed(file, lambda: json.loads(raw)["manifest"])
    if body["format"] != FORMAT:
        raise CheckpointError(f"{file} has format {body['format']}; this version reads format {FORMAT}")
    if folder.name != folder_name(body["step"]):
        raise CheckpointError(f"{file} belongs to {folder_name(body['step'])}, not to a directory named {folder.name}")
    files = {name: FileDigest(**digest) for name, digest in body["files"].items()}
    tensors = {name: _decoded(tensor) for name, tensor in body["tensors"].items()}
    return Manifest(body["step"], files, tensors)


def folder_name(step: int) -> str:
    """What a checkpoint is called."""
    return f"step-{step:08d}"


def seal(tail: bytes) -> bytes:
    """The manifest's first line, which protects all that follows it byte by byte."""
    return b'{"sha256": "%s",\n' % sha256(tail).encode()


def parsed(file: Path, parse: Callable[[], T]) -> T:
    """Parse a verified file; that fails only where the manifest was made for other contents."""
    try:
        return parse()
    except (ValueError, KeyError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{file} matches its hash but is not what its name says: {error}") from error


def _encoded(tensor: StoredTensor) -> dict[str, Any]:
    parts = [{"file": file, "offset": region.offset, "shape": region.shape} for file, region in tensor.parts]
    return {"dtype": tensor.dtype, "shape": tensor.shape, "parts": parts}


def _decoded(body: Mapping[str, Any]) -> StoredTensor:
    parts = ((part["file"], Region(tuple(part["offset"]), tuple(part["shape"]))) for part in body["parts"])
    return StoredTensor(body["dtype"], tuple(body["shape"]), tuple(parts))
