"""What a state checkpoint of a run holds, and when a run may go on from one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llava_core.config.load import without_numbers
from llava_core.data.piece_template import template_file
from llava_core.engine.parts import local_parts
from llava_core.errors import CheckpointError
from llava_core.train.agreement import agree
from llava_core.train.checkpoint import Draft, draft_state, open_newest, write_draft
from llava_core.train.prepare import Run
from llava_core.train.stored import Checkpoint

FREE_TO_CHANGE = (
    "output",
    "checkpoint.",
    "log.",
    "backend.",
    "parallel.",
    "train.recompute",
    "train.recompute_layers",
    "train.offload_activations",
    "data.num_workers",
    "data.max_bad_fraction",
    "validation.",
    # Where the files lie; what they hold is compared by itself.
    "data.path",
    "data.images",
    "data.sources.path",
    "data.sources.images",
    "model.path",
    "model.vision",
    "model.language",
    "model.projector",
    "lora.path",
)
"""Settings that do not change the numbers of a run beyond the order of sums; those that end in a dot stand for a
section, and those of a list's entries are written without its number."""

NOT_FREE = ("parallel.reduce_dtype", "validation.fraction")
"""What of these sections changes the numbers."""

HEAD_BYTES = 1 << 20
SAMPLE_BYTES, NUM_SAMPLES = 1 << 16, 32


def checkpoint_folder(run: Run) -> Path:
    """Where the run's state checkpoints lie."""
    return run.config.output / "checkpoints"


def save(run: Run, step: int) -> Path:
    """Save the run's whole state after `step` optimizer steps; every process calls it. Raises CheckpointError."""
    return write_draft(checkpoint_folder(run), draft(run, step), run.processes)


def draft(run: Run, step: int) -> Draft:
    """What `save` writes; its tensors are those that training changes. Every process calls it."""
    tensors, engine_state = run.engine.state()
    state: dict[str, Any] = {
        "engine": engine_state,
        "loader": run.loader.state_dict(),
        "validated": 0 if run.validation is None else run.validation.validated,
        "settings": _settings(run),
        "weights": _weights_fingerprint(run),
        "environment": {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "processes": run.processes.size,
            "backend": _backend(run),
        },
    }
    keep = run.config.checkpoint.keep
    return draft_state(step, local_parts(tensors), state, keep=keep, processes=run.processes)


def resume(run: Run) -> tuple[int, list[str]]:
    """Return the run to its newest sound checkpoint; every process calls it.

    Returns:
        The optimizer steps done so far, 0 for a fresh start; and what the user should know.

    Raises:
        CheckpointError: every checkpoint is damaged, or the newest sound one is of another run.
    """
    folder = checkpoint_folder(run)
    if not run.config.checkpoint.resume:
        if folder.is_dir() and any(folder.glob("step-*")):
            raise CheckpointError(
                f"{folder} holds checkpoints and checkpoint.resume is false: name another output, or remove them."
            )
        return 0, []
    loaded, skipped = open_newest(folder, run.processes)
    notes = [f"skipped a damaged checkpoint: {path}: {reason}" for path, reason in skipped]
    if loaded is None:
        if skipped:
            raise CheckpointError(
                "no checkpoint is sound; to start afresh name another output folder.\n" + "\n".join(notes)
            )
        return 0, []
    agree(run.processes, partial(_restore, run, loaded))
    notes.append(f"resumed after step {loaded.step} from {folder}")
    notes += _differences(loaded.state["environment"], run)
    return loaded.step, notes


def _restore(run: Run, saved: Checkpoint) -> None:
    _check_same_run(saved.state, run, saved.path.parent)
    run.engine.load_state(saved, saved.state["engine"])
    run.loader.load_state_dict(saved.state["loader"])
    if run.validation is not None:
        run.validation.validated = saved.state["validated"]


def _differences(environment: Mapping[str, Any], run: Run) -> list[str]:
    """What keeps the run from repeating the one that was saved bit for bit, for the user to know."""
    notes = []
    threads, then, now = environment["threads"], environment["processes"], run.processes.size
    if then != now:
        notes.append(
            f"the checkpoint was made by {then} process{'es' * (then > 1)}, this run has {now}: the state and "
            "the order of samples are the same, sums may differ in their last bits."
        )
    if threads != torch.get_num_threads():
        notes.append(
            f"the checkpoint was made with {threads} threads, this run has {torch.get_num_threads()}: sums may differ "
            f"in their last bits. Set backend.threads={threads} to repeat it bit for bit."
        )
    return notes


def _check_same_run(state: Mapping[str, Any], run: Run, folder: Path) -> None:
    now, then = _settings(run), state["settings"]
    changed = [
        f"\n  {key}: was {then.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(now.keys() | then.keys())
        if now.get(key) != then.get(key)
    ]
    if _weights_fingerprint(run) != state["weights"]:
        changed.append("\n  the model's weights files are not those it started from")
    if changed:
        raise CheckpointError(
            f"{folder} belongs to a run with other settings:{''.join(changed)}\n"
            "Restore them to resume, or name another output folder to start afresh."
        )


def _settings(run: Run) -> dict[str, Any]:
    flat = _flatten(run.config.model_dump(mode="json"))
    settings = {key: value for key, value in flat.items() if not _is_free(key)}
    sources = run.loader.builder.sources.sources
    templates = {f"data.sources.{number}.template": source.template for number, source in enumerate(sources)}
    for key, template in {"data.template": run.template, **templates}.items():
        name = settings.get(key)
        if template is not None and name is not None and template_file(name) is not None:
            settings[key] = repr(replace(template, name=""))  # what it says is compared, not where it lies
    return settings | {"train.precision": str(run.engine.model.compute_dtype)}


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, list) and item and all(isinstance(entry, Mapping) for entry in item):
            item = {str(number): entry for number, entry in enumerate(item)}
        flat |= _flatten(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {prefix + key: item}
    return flat


def _is_free(key: str) -> bool:
    key = without_numbers(key)
    if key in NOT_FREE:
        return False
    return any(key.startswith(free) if free.endswith(".") else key == free for free in FREE_TO_CHANGE)


def _weights_fingerprint(run: Run) -> list[Any]:
    """Name, size and a hash of every weights file."""
    return [[file.name, file.stat().st_size, _sampled_hash(file)] for file in run.source.files]


def _sampled_hash(path: Path) -> str:
    """Of the head, which holds names and shapes, and of samples throughout: other weights differ everywhere."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(HEAD_BYTES))
        for index in range(1, NUM_SAMPLES + 1):
            file.seek(max(0, size * index // NUM_SAMPLES - SAMPLE_BYTES))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _backend(run: Run) -> str:
    return f"{run.hardware.backend.name} ({run.hardware.device_name})"
