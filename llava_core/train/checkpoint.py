"""State checkpoints: directories of safetensors and JSON, complete or absent, verified before use.

    step-00000123/
        tensors-00001.safetensors …     every tensor under its logical name, whole
        state.json                      everything that is not a tensor
        manifest.json                   format, step, each file's size and hash; its first line is the hash of the rest

A checkpoint is written as `step-00000123.partial`, made durable, then renamed: the plain name never stands for half of
one. One on its way out is first renamed to `step-00000123.deleting`. Neither is ever read; the next save sweeps both
away. A root has one writer at a time. The hashes guard against damage, not against forgery; no file can make loading
run code.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from torch import Tensor

from llava_core.errors import CheckpointError
from llava_core.train.durable import FileDigest, make_directory, sha256, sync_directory, write_file

JSON: TypeAlias = bool | int | float | str | list[Any] | dict[str, Any] | None
_T = TypeVar("_T")

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
_COMPLETE = re.compile(r"step-([0-9]{8,})")
_LITTER = re.compile(r"step-[0-9]{8,}\.(partial|deleting)")

_DTYPE_NAMES = {
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


@dataclass(frozen=True)
class State:
    """A verified checkpoint. Each tensor is on the CPU and owns its memory, even if several shared one when saved."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save_state(
    root: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, JSON],
    *,
    keep: int | None,
    max_file_bytes: int = 4_000_000_000,
) -> Path:
    """Write `root/step-N` durably, then remove older checkpoints beyond the newest `keep` (None: remove none).

    A sound checkpoint of this step is never overwritten; a damaged one is replaced, with a warning. `keep` counts steps
    up to and including this one, by name and without verifying them; later steps are left alone. Tensors that share
    storage are each written whole. A file's tensors exceed `max_file_bytes` only where one alone does.

    Raises:
        ValueError: an argument that cannot be stored exactly; nothing was written.
        CheckpointError: a sound checkpoint of this step exists, or the disk refused. The older checkpoints are intact.
    """
    if step < 0 or (keep is not None and keep < 1):
        raise ValueError(f"step={step}, keep={keep}: step must be at least 0, keep at least 1 or None")
    plan = _plan_tensor_files(tensors, max_file_bytes)
    state_bytes = _encode_state(state)
    final = root / _name(step)
    partial = final.with_name(final.name + ".partial")
    if os.path.lexists(final):
        _refuse_if_sound(final)
    try:
        with _naming(f"step {step} could not be saved; older checkpoints are untouched"):
            make_directory(root)
            _sweep(root)
            _write(partial, step, plan, state_bytes)
            if os.path.lexists(final):
                _retire(final)
            os.rename(partial, final)
            sync_directory(root)
    except CheckpointError:
        # Frees a full disk at once. What resists is named `.partial`, so it is never read and the next save sweeps it.
        shutil.rmtree(partial, ignore_errors=True)
        raise
    with _naming(f"step {step} is saved in {final}, but older checkpoints could not be removed"):
        older = [path for path in _complete(root) if _step(path) <= step][keep:] if keep is not None else []
        for path in older:
            _retire(path)
        if older:
            # The names must be gone for good before the contents go.
            sync_directory(root)
        _sweep(root)
    return final


def load_state(path: Path) -> State:
    """Read a checkpoint; every byte of every file is verified before anything is returned.

    Raises:
        CheckpointError: it is absent, incomplete or damaged; the message names the file and what differs.
    """
    step, files = _read_manifest(path)
    tensors: dict[str, Tensor] = {}
    state: dict[str, Any] = {}
    for file, data in _verified_files(path, files):
        if file.name == STATE:
            state = _parsed(file, json.loads, data)
            continue
        part = _parsed(file, parse_safetensors, data)
        if twice := sorted(tensors.keys() & part.keys()):
            raise CheckpointError(f"{file}: tensors {twice} are in an earlier file already")
        tensors.update(part)
    return State(step, tensors, state)


def load_newest(root: Path) -> tuple[State | None, list[tuple[Path, str]]]:
    """Load the newest complete and verified checkpoint.

    Returns:
        The state, and each newer checkpoint that is damaged with the reason. The caller must show these; None with a
        non-empty list means that every checkpoint is damaged, which is not a fresh start.
    """
    skipped: list[tuple[Path, str]] = []
    for path in _complete(root):
        try:
            return load_state(path), skipped
        except CheckpointError as error:
            skipped.append((path, str(error)))
    return None, skipped


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _complete(root: Path) -> list[Path]:
    """What bears a complete checkpoint's name, newest first; not verified."""
    with _naming(f"{root} cannot be listed"):
        paths = list(root.iterdir()) if root.is_dir() else []
    # `step-000000001` matches too, but is no name that a save gives.
    named = [path for path in paths if _COMPLETE.fullmatch(path.name) and path.name == _name(_step(path))]
    return sorted(named, key=_step, reverse=True)


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Turn an OSError into a CheckpointError that says what failed."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{what}: {error}") from error


def _plan_tensor_files(tensors: Mapping[str, Tensor], max_file_bytes: int) -> list[tuple[bytes, list[Tensor]]]:
    """Each tensor file's header, and its tensors in the order of their bytes."""
    for name, tensor in tensors.items():
        # A subclass (a sharded tensor, say) may hold only a part of the values; a meta tensor holds none.
        plain = type(tensor.detach()) is Tensor and tensor.layout == torch.strided and not tensor.is_meta
        if not plain or tensor.dtype not in _DTYPE_NAMES or name == "__metadata__":
            raise ValueError(
                f"tensor {name!r} cannot be stored: {type(tensor).__name__}, {tensor.dtype}, {tensor.layout}, "
                f"{tensor.device}. Pass a plain dense tensor of a dtype among {', '.join(_DTYPE_NAMES.values())}, "
                "under any name but '__metadata__'."
            )
    groups: list[dict[str, Tensor]] = []
    room = 0
    # Wide elements first: each tensor then starts at a multiple of its element's size, as readers that map files need.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        if not groups or tensor.nbytes > room:
            groups.append({})
            room = max_file_bytes
        groups[-1][name] = tensor
        room -= tensor.nbytes
    return [(_header(group), list(group.values())) for group in groups]


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    """The safetensors header: its length as 8 little-endian bytes, then JSON, padded to a multiple of 8.

    Written here because the library's writer wants a whole file in host memory, contiguous and without shared storage.
    Source: the format section of the safetensors README.
    """
    entries: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        offsets = [end, end + tensor.nbytes]
        entries[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        end += tensor.nbytes
    text = json.dumps(entries, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _tensor_bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _encode_state(state: Mapping[str, JSON]) -> bytes:
    """JSON that reads back equal: a tuple, a key that is not text or a NaN would come back as something else."""
    plain = dict(state)
    try:
        data = json.dumps(plain, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"state is not JSON: {error}") from error
    if (restored := json.loads(data)) != plain:
        changed = [key for key in plain if key not in restored or restored[key] != plain[key]]
        raise ValueError(f"state under {changed} does not survive JSON: use lists for tuples and text for keys")
    return data


def _write(partial: Path, step: int, plan: Iterable[tuple[bytes, list[Tensor]]], state_bytes: bytes) -> None:
    """Write and fsync every file of a checkpoint, the manifest last, then the directory."""
    partial.mkdir()
    files: dict[str, FileDigest] = {}
    for number, (header, tensors) in enumerate(plan, 1):
        name = f"tensors-{number:05d}.safetensors"
        # `map` is lazy: one tensor at a time is copied to the host.
        files[name] = write_file(partial / name, chain([header], map(_tensor_bytes, tensors)))
    files[STATE] = write_file(partial / STATE, [state_bytes])
    body = {"format": FORMAT, "step": step, "files": {name: asdict(digest) for name, digest in files.items()}}
    tail = b'"manifest": ' + json.dumps(body, indent=1).encode() + b"}\n"
    write_file(partial / MANIFEST, [_seal(tail), tail])
    sync_directory(partial)


def _seal(tail: bytes) -> bytes:
    """The manifest's first line, which protects all that follows it byte by byte."""
    return b'{"sha256": "%s",\n' % sha256(tail).encode()


def _read_manifest(path: Path) -> tuple[int, dict[str, FileDigest]]:
    """The step and what each file must hold."""
    file = path / MANIFEST
    with _naming(f"{path} is no complete checkpoint"):
        raw = file.read_bytes()
    head, newline, tail = raw.partition(b"\n")
    if head + newline != _seal(tail):
        raise CheckpointError(f"{file} is damaged: its {len(raw)} bytes do not match the hash on its first line")
    body = _parsed(file, json.loads, raw)["manifest"]
    if body["format"] != FORMAT:
        raise CheckpointError(f"{file} has format {body['format']}; this version reads format {FORMAT}")
    if path.name != _name(body["step"]):
        raise CheckpointError(f"{file} belongs to {_name(body['step'])}, not to a directory named {path.name}")
    files = {name: FileDigest(**digest) for name, digest in body["files"].items()}
    return body["step"], files


def _verified_files(path: Path, files: Mapping[str, FileDigest]) -> Iterator[tuple[Path, bytes]]:
    """Each file with its bytes, read once: what was verified is what is used."""
    with _naming(f"{path} cannot be listed"):
        found = set(os.listdir(path)) - {MANIFEST}
    if found != files.keys():
        missing, extra = sorted(files.keys() - found), sorted(found - files.keys())
        raise CheckpointError(f"{path} does not hold what its manifest lists: missing {missing}, not listed {extra}")
    for name, expected in files.items():
        file = path / name
        with _naming(f"{file} cannot be read"):
            data = file.read_bytes()
        if (seen := FileDigest(len(data), sha256(data))) != expected:
            raise CheckpointError(f"{file} is damaged: it holds {seen}, the manifest expects {expected}")
        yield file, data


def _verify(path: Path) -> None:
    _, files = _read_manifest(path)
    for _ in _verified_files(path, files):
        pass


def _parsed(file: Path, parse: Callable[[bytes], _T], data: bytes) -> _T:
    """Parse verified bytes; these fail only where the manifest was made for other contents."""
    try:
        return parse(data)
    except (ValueError, KeyError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{file} matches its hash but is not what its name says: {error}") from error


def _refuse_if_sound(path: Path) -> None:
    try:
        _verify(path)
    except CheckpointError as error:
        warnings.warn(f"replacing a damaged checkpoint: {error}", stacklevel=3)
    else:
        raise CheckpointError(f"{path} exists and is sound; it is never overwritten: remove it or save another step")


def _retire(path: Path) -> None:
    """Take a checkpoint's name away; the sweep that follows removes what it held."""
    os.rename(path, path.with_name(path.name + ".deleting"))


def _sweep(root: Path) -> None:
    """Remove what interrupted saves and removals left behind."""
    for path in root.iterdir():
        if _LITTER.fullmatch(path.name):
            shutil.rmtree(path)
