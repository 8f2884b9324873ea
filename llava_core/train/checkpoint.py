"""State checkpoints: directories of safetensors and JSON, complete or absent, verified before use.

    step-00000123/
        tensors-00000-00001.safetensors …   the parts of tensors that a process held, under logical names
        state.json                          everything that is not a tensor
        manifest.json                       format, step, each file's size and hash, each tensor's dtype, shape and
                                            parts; its first line is the hash of the rest

No layout is in it: each process writes the boxes that it holds, and each reads the boxes that it needs, from whatever
files they lie in. All processes of a run call each function here together; where one fails, all raise.

A checkpoint is written as `step-00000123.partial`, made durable, then renamed: the plain name never stands for half of
one. One on its way out is first renamed to `step-00000123.deleting`. Neither is ever read; the next save sweeps both
away. A root has one writing run at a time. The hashes guard against damage, not against forgery; no file can make
loading run code.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from llava_core.durable import make_directory, naming, sync_directory, write_file
from llava_core.engine.parts import Part
from llava_core.engine.processes import Processes
from llava_core.errors import CheckpointError
from llava_core.train.agreement import agree, by_first
from llava_core.train.manifest import MANIFEST, STATE, Manifest, folder_name
from llava_core.train.shares import Shared, held_by, manifest_of, share_out, write_share
from llava_core.train.stored import Checkpoint, verified
from llava_core.train.tensor_files import split

JSON: TypeAlias = bool | int | float | str | list[Any] | dict[str, Any] | None

ALONE = Processes()
_COMPLETE = re.compile(r"step-([0-9]{8,})")
_LITTER = re.compile(r"step-[0-9]{8,}\.(partial|deleting)")
MAX_FILE_BYTES = 4_000_000_000


@dataclass(frozen=True)
class Draft:
    """What a checkpoint is to hold: all processes have agreed on it, and nothing is written.

    Attributes:
        shared: every tensor, and which process writes each of its boxes.
        own: the boxes that this process writes. They must not change before they are written.
        state: the first process's, encoded.
        keep: how many checkpoints to keep, this one included; None for all.
    """

    step: int
    shared: Mapping[str, Shared]
    own: Mapping[str, Tensor]
    state: bytes
    keep: int | None


def save_state(
    root: Path,
    step: int,
    parts: Mapping[str, Part],
    state: Mapping[str, JSON],
    *,
    keep: int | None,
    processes: Processes = ALONE,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Path:
    """Write `root/step-N` durably, then remove older checkpoints beyond the newest `keep` (None: remove none).

    A sound checkpoint of this step is never overwritten; a damaged one is replaced, with a warning. `keep` counts steps
    up to and including this one, by name and without verifying them; later steps are left alone. Tensors that share
    storage are each written whole. A file's tensors exceed `max_file_bytes` only where one alone does.

    Args:
        parts: what this process holds of each tensor; a box that several hold is written by the first of them.
        state: the first process's is saved.

    Raises:
        ValueError: an argument that cannot be stored exactly, or parts that do not make up whole tensors; nothing was
            written.
        CheckpointError: a sound checkpoint of this step exists, or the disk refused a process, which the message names.
            The older checkpoints are intact.
    """
    draft = draft_state(step, parts, state, keep=keep, processes=processes)
    return write_draft(root, draft, processes, max_file_bytes=max_file_bytes)


def draft_state(
    step: int,
    parts: Mapping[str, Part],
    state: Mapping[str, JSON],
    *,
    keep: int | None,
    processes: Processes = ALONE,
) -> Draft:
    """The first half of `save_state`, which raises its ValueErrors: what each process is to write."""
    if step < 0 or (keep is not None and keep < 1):
        raise ValueError(f"step={step}, keep={keep}: step must be at least 0, keep at least 1 or None")
    shared = share_out(agree(processes, lambda: held_by(parts)))
    state_bytes = by_first(processes, lambda: _encode_state(state))
    own = {name: part.data for name, part in parts.items() if shared[name].writers.get(part.region) == processes.rank}
    return Draft(step, shared, own, state_bytes, keep)


def write_draft(
    root: Path, draft: Draft, processes: Processes = ALONE, *, max_file_bytes: int = MAX_FILE_BYTES
) -> Path:
    """The second half of `save_state`, which raises its CheckpointErrors; of a draft of the same processes."""
    step, own = draft.step, draft.own
    final = root / folder_name(step)
    partial = final.with_name(final.name + ".partial")
    saving = naming(f"step {step} could not be saved; older checkpoints are untouched")
    try:
        by_first(processes, saving(lambda: _begin(root, partial, final)))
        written = agree(processes, saving(lambda: write_share(partial, processes.rank, split(own, max_file_bytes))))
        manifest = manifest_of(step, draft.shared, written)
        by_first(processes, saving(lambda: _finish(partial, final, manifest, draft.state)))
    except CheckpointError:
        if processes.is_first:
            # Frees a full disk at once. What resists is named `.partial`: never read, and swept by the next save.
            shutil.rmtree(partial, ignore_errors=True)
        raise
    pruning = naming(f"step {step} is saved in {final}, but older checkpoints could not be removed")
    by_first(processes, pruning(lambda: _prune(root, step, draft.keep)))
    return final


def open_checkpoint(path: Path, processes: Processes = ALONE) -> Checkpoint:
    """Open a checkpoint; first every byte of every file is verified, by one of the processes each.

    Raises:
        CheckpointError: it is absent, incomplete or damaged; the message names the file and what differs.
    """
    opened: list[Checkpoint] = []
    agree(processes, lambda: opened.append(verified(path, processes.rank, processes.size)))
    return opened[0]


def open_newest(root: Path, processes: Processes = ALONE) -> tuple[Checkpoint | None, list[tuple[Path, str]]]:
    """Open the newest complete and verified checkpoint; the same in all processes.

    Returns:
        The checkpoint, and each newer one that is damaged with the reason. The caller must show these; None with a
        non-empty list means that every checkpoint is damaged, which is not a fresh start.
    """
    skipped: list[tuple[Path, str]] = []
    for path in by_first(processes, lambda: _complete(root)):
        try:
            return open_checkpoint(path, processes), skipped
        except CheckpointError as error:
            skipped.append((path, str(error)))
    return None, skipped


def _complete(root: Path) -> list[Path]:
    """What bears a complete checkpoint's name, newest first; not verified."""
    with naming(f"{root} cannot be listed"):
        paths = list(root.iterdir()) if root.is_dir() else []
    # `step-000000001` matches too, but is no name that a save gives.
    named = [path for path in paths if _COMPLETE.fullmatch(path.name) and path.name == folder_name(_step(path))]
    return sorted(named, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


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


def _begin(root: Path, partial: Path, final: Path) -> None:
    """Make room for a checkpoint."""
    if os.path.lexists(final):
        _refuse_if_sound(final)
    make_directory(root)
    _sweep(root)
    partial.mkdir()


def _finish(partial: Path, final: Path, manifest: Manifest, state_bytes: bytes) -> None:
    """Write the other files of a checkpoint, the manifest last, and give it its name."""
    digest = write_file(partial / STATE, [state_bytes])
    complete = replace(manifest, files={**manifest.files, STATE: digest})
    write_file(partial / MANIFEST, [complete.encode()])
    sync_directory(partial)
    if os.path.lexists(final):
        _retire(final)
    os.rename(partial, final)
    sync_directory(final.parent)


def _prune(root: Path, step: int, keep: int | None) -> None:
    """Remove all but the newest `keep` checkpoints up to a step, and litter."""
    older = [path for path in _complete(root) if _step(path) <= step][keep:] if keep is not None else []
    for path in older:
        _retire(path)
    if older:
        # The names must be gone for good before the contents go.
        sync_directory(root)
    _sweep(root)


def _refuse_if_sound(path: Path) -> None:
    try:
        verified(path, 0, 1)
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
