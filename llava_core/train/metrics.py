"""What a step is reported as: one JSON object a line in `metrics.jsonl`, and the trackers a run asks for."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from llava_core.errors import DataError

METRICS_FILE = "metrics.jsonl"

VALIDATION_LOSS = "validation_loss"
"""The key that only lines of validations have."""


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step.

    Attributes:
        lr: the highest learning rate of any part.
        data_time: seconds spent waiting for the data.
        loss: of the step, before its update.
        time: seconds of the whole step, the data included.
        tflops: model TFLOP/s of this device over `time`.
        tokens_per_sec: text and image tokens a second, padding not counted.
        text_tokens_per_sec: text tokens only, the figure that XTuner calls tokens_per_sec.
        iter, step: optimizer steps done; two names, for readers of either kind of log.
        tokens: of text and images in all steps so far.
        memory: peak device memory in MiB.
        overlong: rows that were longer than `data.max_length`.
        mfu: `tflops` over the device's peak; None where that is unknown.
        grad_norm: before clipping; not finite where `skipped`.
        skipped: the gradients overflowed fp16 and nothing was updated.
    """

    lr: float
    data_time: float
    loss: float
    time: float
    tflops: float
    tokens_per_sec: float
    iter: int
    memory: int
    step: int
    tokens: int
    grad_norm: float
    text_tokens_per_sec: float
    text_tokens: int
    image_tokens: int
    label_tokens: int
    pad_tokens: int
    samples: int
    overlong: int
    epoch: float
    mfu: float | None
    skipped: bool


@dataclass(frozen=True)
class ValidationMetrics:
    """The model on the validation data, after `step` optimizer steps.

    Attributes:
        validation_loss: mean over the supervised tokens of all samples, whatever `train.loss` weights.
        validation_perplexity: e to the power of it.
        validation_time: seconds, the data included.
        validation_label_tokens, validation_samples: how many supervised tokens there were, in how many samples.
    """

    step: int
    validation_loss: float
    validation_perplexity: float
    validation_time: float
    validation_label_tokens: int
    validation_samples: int


class Tracker(Protocol):
    """Somewhere else that metrics go."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """The numbers of one step, or of the validation after it, whose names begin with `validation_`."""

    def close(self) -> None:
        """The run has ended; nothing more comes."""


class MetricsLog:
    """`metrics.jsonl` of a run's folder. Lines of what a resumed run does again are taken off first.

    Args:
        resumed_step: that it resumes from.
        validates_again: whether it begins with the validation that belongs to that step.
    """

    def __init__(self, folder: Path, resumed_step: int, *, validates_again: bool = False) -> None:
        self.path = folder / METRICS_FILE
        folder.mkdir(parents=True, exist_ok=True)
        kept = [
            row
            for row in _read_lines(folder)
            if row["step"] < resumed_step
            or (row["step"] == resumed_step and not (validates_again and VALIDATION_LOSS in row))
        ]
        # Through another name: a run that dies here must not lose the lines of the steps it resumed from.
        rewritten = self.path.with_name(METRICS_FILE + ".partial")
        rewritten.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(rewritten, self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def log(self, metrics: StepMetrics | ValidationMetrics) -> None:
        """Append a line; the line has left the process on return. JSON has no infinity: what is not finite is null."""
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(metrics).items()}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The steps in a run's `metrics.jsonl`; none where there is no file. A line cut short by a crash is left out.

    Raises:
        DataError: a whole line that is not JSON.
    """
    return [row for row in _read_lines(folder) if VALIDATION_LOSS not in row]


def read_validations(folder: Path) -> list[dict[str, float]]:
    """The validations in it. Raises as `read_metrics`."""
    return [row for row in _read_lines(folder) if VALIDATION_LOSS in row]


def _read_lines(folder: Path) -> list[dict[str, float]]:
    path = folder / METRICS_FILE
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    try:
        return [json.loads(line) for line in lines[:-1]]
    except ValueError as error:
        raise DataError(f"{path} holds a line that is not JSON ({error}): mend or remove the file.") from error
