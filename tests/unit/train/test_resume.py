"""A run that stops anywhere and goes on ends with the bits of the run that did not."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llava_core.data.records import modality_length
from llava_core.data.templates import FILES
from llava_core.errors import CheckpointError, DataError
from llava_core.testing.datasets import TinyParts, tiny_parts
from llava_core.train import resume
from llava_core.train.prepare import Run
from tests.unit.train.support import assert_bit_equal, engine_tensors, metrics_rows, run_to_end, tiny_run

STEPS = 7  # five are an epoch: the last of the first epoch, of 4 rows, and both sides of it are among them
CASES: dict[str, tuple[str, ...]] = {
    "packed": (),
    "padded": ("batch.micro_tokens=null", "batch.micro_size=2"),
    "modality_length": ("batch.micro_tokens=null", "batch.micro_size=2", "data.order=modality_length"),
    "modality_length_packed": ("data.order=modality_length", "train.trainable=[projector]"),
    "length_grouped": ("data.order=length_grouped", "data.mega_batch_mult=2", "train.trainable=[projector]"),
    "workers": ("data.num_workers=2",),
    "bf16_everything": ("train.precision=bf16", "train.trainable=[vision,projector,language]", "train.recompute=full"),
    "tokens": ("train.max_steps=null", "train.max_tokens=9000"),
    "validated": ("validation.fraction=0.3", "validation.every_steps=2"),
    "fp16": ("train.precision=fp16", "train.loss=sequence_mean"),
}
QUICK = ("packed", "modality_length", "tokens", "validated")


@dataclass(frozen=True)
class Finished:
    """What an uninterrupted run was and left."""

    output: Path
    taken: list[list[str]]
    rows: list[dict[str, Any]]
    tensors: dict[str, Tensor]


def overrides(case: str) -> tuple[str, ...]:
    return (f"train.max_steps={STEPS}", "checkpoint.keep=null", *CASES[case])


def finish(parts: TinyParts, output: Path, *changes: str) -> Finished:
    run = tiny_run(parts, output, *changes)
    taken = run_to_end(run)
    return Finished(output, taken, metrics_rows(output), engine_tensors(run))


def as_stopped_after(step: int, finished: Finished, output: Path) -> Path:
    """A folder as if the run had died some time after saving `step`: with lines of metrics beyond it."""
    name = f"checkpoints/step-{step:08d}"
    shutil.copytree(finished.output / name, output / name)
    shutil.copy(finished.output / "metrics.jsonl", output)
    return output


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_resumed_at_every_step_it_ends_bit_equal(case: str, parts: TinyParts, tmp_path: Path) -> None:
    plain = finish(parts, tmp_path / "plain", *overrides(case))
    saving = finish(parts, tmp_path / "saving", *overrides(case), "checkpoint.every_steps=1")
    assert_bit_equal(saving.tensors, plain.tensors)  # saving changes nothing
    for step in range(1, STEPS + 1):
        assert_resumes(parts, as_stopped_after(step, saving, tmp_path / f"from-{step}"), plain, step, case)


@pytest.mark.device
@pytest.mark.parametrize("case", ["packed", "bf16_everything", "fp16"])
def test_resumed_in_a_new_epoch_it_ends_bit_equal(case: str, parts: TinyParts, tmp_path: Path) -> None:
    """The same at one step, for devices, some of which take their time."""
    whole = finish(parts, tmp_path / "whole", *overrides(case), "checkpoint.every_steps=6")
    assert_resumes(parts, as_stopped_after(6, whole, tmp_path / "run"), whole, 6, case)


def assert_resumes(parts: TinyParts, output: Path, whole: Finished, step: int, case: str) -> None:
    """The run that stopped after `step` ends as the whole one did."""
    run = tiny_run(parts, output, *overrides(case))
    assert run_to_end(run) == whole.taken[step:]
    assert metrics_rows(output) == whole.rows, f"resumed after step {step}"
    assert_bit_equal(engine_tensors(run), whole.tensors)


def test_the_cases_are_what_they_are_for(parts: TinyParts, tmp_path: Path) -> None:
    run = tiny_run(parts, tmp_path / "run", *overrides("modality_length"))
    step = next(iter(run.loader))
    assert len(step.batches) == 4, "accumulation over several micro-batches"
    reader = run.loader.builder.sources.sources[0].reader
    modalities = {modality_length(reader.read(row)) > 0 for row in run.loader.order(0)[:8]}
    assert len(modalities) == 1, "grouped by modality"


@pytest.mark.parametrize("workers", [pytest.param((0, 2), marks=pytest.mark.device), (2, 0)])
def test_the_number_of_workers_may_change(workers: tuple[int, int], parts: TinyParts, tmp_path: Path) -> None:
    before, after = (f"data.num_workers={number}" for number in workers)
    whole = finish(parts, tmp_path / "whole", *overrides("packed"), "checkpoint.every_steps=1", before)
    output = as_stopped_after(2, whole, tmp_path / "run")
    run = tiny_run(parts, output, *overrides("packed"), after)
    assert run_to_end(run) == whole.taken[2:]
    assert metrics_rows(output) == whole.rows
    assert_bit_equal(engine_tensors(run), whole.tensors)


def test_where_it_started_the_second_time_is_said(parts: TinyParts, tmp_path: Path) -> None:
    whole = finish(parts, tmp_path / "whole", *overrides("packed"), "checkpoint.every_steps=3")
    done, notes = resume.resume(tiny_run(parts, whole.output, *overrides("packed")))
    assert done == 7  # the last step is saved, too
    assert "resumed after step 7" in notes[0]


@pytest.fixture(scope="module")
def stopped(parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints after steps 2 and 4; never written to."""
    output = tmp_path_factory.mktemp("stopped") / "run"
    finish(parts, output, "train.max_steps=5", "checkpoint.every_steps=2", "checkpoint.keep=null")
    shutil.rmtree(output / "checkpoints" / "step-00000005")  # the end, which a stopped run has not reached
    return output


def copied(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("optimizer.learning_rate=2e-3", "optimizer.learning_rate: was 0.001, is 0.002"),
        ("train.max_steps=6", "train.max_steps: was 5, is 6"),
        ("train.seed=1", "train.seed"),
        ("train.precision=bf16", "train.precision"),
        ("train.trainable=[projector]", "train.trainable"),
        ("data.template=llama_2", "data.template"),
        ("batch.global_size=4", "batch.global_size"),
        ("optimizer.part_learning_rates.projector=1e-4", "optimizer.part_learning_rates.projector"),
        ("parallel.reduce_dtype=bf16", "parallel.reduce_dtype"),
    ],
)
def test_a_changed_setting_is_refused_by_its_name(
    change: str, key: str, parts: TinyParts, stopped: Path, tmp_path: Path
) -> None:
    run = tiny_run(parts, copied(stopped, tmp_path), "train.max_steps=5", change)
    before = engine_tensors(run)
    with pytest.raises(CheckpointError, match=key):
        resume.resume(run)
    assert_bit_equal(engine_tensors(run), before)


def test_a_template_file_may_move_and_must_not_change(parts: TinyParts, tmp_path: Path) -> None:
    file = resources.files(FILES) / "v1.yaml"
    first, moved, changed = (tmp_path / folder / "talk.yaml" for folder in ("first", "moved", "changed"))
    for path in (first, moved, changed):
        path.parent.mkdir()
        path.write_text(file.read_text())
    changed.write_text(changed.read_text().replace("curious user", "curious child"))

    def run_with(template: Path) -> Run:
        return tiny_run(parts, tmp_path / "run", f"data.template={template}")

    resume.save(run_with(first), 1)
    assert resume.resume(run_with(moved))[0] == 1
    with pytest.raises(CheckpointError, match=r"data\.template: was .*curious user.* is .*curious child"):
        resume.resume(run_with(changed))


@pytest.mark.parametrize(
    "change", ["checkpoint.keep=7", "log.every_steps=3", "data.num_workers=1", "parallel.data=grad"]
)
def test_what_does_not_change_the_numbers_may_change(
    change: str, parts: TinyParts, stopped: Path, tmp_path: Path
) -> None:
    run = tiny_run(parts, copied(stopped, tmp_path), "train.max_steps=5", change)
    assert resume.resume(run)[0] == 4


def test_other_weights_are_refused(parts: TinyParts, stopped: Path, tmp_path: Path) -> None:
    language = Path(shutil.copytree(parts.language, tmp_path / "language"))
    weights = load_file(language / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    save_file(weights, language / "model.safetensors", metadata={"format": "pt"})
    run = tiny_run(parts, copied(stopped, tmp_path), "train.max_steps=5", f"model.language={language}")
    with pytest.raises(CheckpointError, match="weights files"):
        resume.resume(run)


def test_another_data_set_is_refused(tmp_path: Path) -> None:
    parts = tiny_parts(tmp_path / "parts", num_rows=16)
    changes = ("train.max_steps=3", "checkpoint.every_steps=2")
    finish(parts, tmp_path / "run", *changes)
    text = parts.data.read_text()
    parts.data.write_text(text[:-1] + f", {text[1 : text.index('}]}') + 3]}]")  # the first row once more
    with pytest.raises(DataError, match="order of samples cannot be continued"):
        resume.resume(tiny_run(parts, tmp_path / "run", *changes))


def damage(checkpoint: Path) -> None:
    file = next(checkpoint.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_damaged_newest_checkpoint_is_skipped_aloud(parts: TinyParts, stopped: Path, tmp_path: Path) -> None:
    output = copied(stopped, tmp_path)
    damage(output / "checkpoints" / "step-00000004")
    done, notes = resume.resume(tiny_run(parts, output, "train.max_steps=5"))
    assert done == 2
    assert "skipped a damaged checkpoint" in notes[0]
    assert "step-00000004" in notes[0]
    run = tiny_run(parts, output, "train.max_steps=5")
    run_to_end(run)
    expected = finish(parts, tmp_path / "plain", "train.max_steps=5")
    assert_bit_equal(engine_tensors(run), expected.tensors)
    assert metrics_rows(output) == expected.rows


def test_only_damaged_checkpoints_are_no_fresh_start(parts: TinyParts, stopped: Path, tmp_path: Path) -> None:
    output = copied(stopped, tmp_path)
    for checkpoint in (output / "checkpoints").iterdir():
        damage(checkpoint)
    with pytest.raises(CheckpointError, match="no checkpoint is sound"):
        resume.resume(tiny_run(parts, output, "train.max_steps=5"))


def test_no_resume_beside_checkpoints_is_an_error(parts: TinyParts, stopped: Path, tmp_path: Path) -> None:
    run = tiny_run(parts, copied(stopped, tmp_path), "train.max_steps=5", "checkpoint.resume=false")
    with pytest.raises(CheckpointError, match="checkpoint.resume is false"):
        resume.resume(run)
    assert resume.resume(tiny_run(parts, tmp_path / "new", "checkpoint.resume=false")) == (0, [])


def test_another_number_of_threads_is_mentioned(parts: TinyParts, stopped: Path, tmp_path: Path) -> None:
    run = tiny_run(parts, copied(stopped, tmp_path), "train.max_steps=5", "backend.threads=2")
    _, notes = resume.resume(run)
    assert torch.get_num_threads() == 2
    assert any("backend.threads=1" in note for note in notes)


def test_another_number_of_processes_is_mentioned(parts: TinyParts, tmp_path: Path) -> None:
    run = tiny_run(parts, tmp_path / "run")
    made_by_eight = {"threads": torch.get_num_threads(), "processes": 8}
    assert "made by 8 processes, this run has 1" in resume._differences(made_by_eight, run)[0]
    assert resume._differences(made_by_eight | {"processes": 1}, run) == []
