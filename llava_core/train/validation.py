"""The data that a run is tried on while it trains, and the loss on it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from llava_core.config import RunConfig
from llava_core.config.data import DataConfig, ValidationConfig
from llava_core.data.documents import TEXT
from llava_core.data.held_out import held_out
from llava_core.data.loader import StepLoader
from llava_core.data.quarantine import Quarantine
from llava_core.data.readers.index import IntArray
from llava_core.engine.processes import Processes
from llava_core.engine.torch_engine import TorchEngine
from llava_core.errors import DataError
from llava_core.plugins import Registry
from llava_core.train.data import build_sources, open_readers
from llava_core.train.metrics import ValidationMetrics
from llava_core.train.schedule import is_due
from llava_core.train.templates import Templates, find_templates
from llava_core.weights.source import ModelFolders

QUARANTINE_FILE = "validation-quarantine.jsonl"


class Validation:
    """The validation data of a run, this process's share of it.

    Args:
        loader: whose first epoch is every row that is validated on, once.

    Attributes:
        validated: the step after which it was last gone through, 0 for none; belongs to the run's checkpoint.
    """

    def __init__(self, loader: StepLoader, every_steps: int | None) -> None:
        self.loader = loader
        self.every_steps = every_steps
        self.validated = 0

    def is_due(self, done: int, *, at_end: bool) -> bool:
        """Whether it is to be gone through after `done` steps, and was not yet."""
        return self.validated < done and (at_end or is_due(self.every_steps, done))

    def check(self) -> None:
        """Some of it can be used: better found before the training than at its end.

        Raises:
            LlavaError: what keeps all of it, or too much, from being used.
        """
        if not any(step.batches for step in self.loader.from_start()):
            raise self._nothing()

    def measure(self, engine: TorchEngine, done: int, stopped: Callable[[], bool]) -> ValidationMetrics | None:
        """The loss after `done` steps; None where it was asked to stop. Every process calls it.

        Args:
            stopped: asked before each `global_size` rows; gives the same in every process.

        Raises:
            LlavaError: too many rows cannot be used.
        """
        start, loss_sum, tokens, samples = time.perf_counter(), 0.0, 0, 0
        for step in self.loader.from_start():
            if stopped():
                return None
            if step.batches:
                # In double precision, and by steps that are the same ones on any number of processes.
                loss_sum += engine.evaluate(step.batches, step.labelled) * step.labelled.tokens
                tokens, samples = tokens + step.labelled.tokens, samples + step.counts.samples
        if not tokens:
            raise self._nothing()
        loss = loss_sum / tokens
        self.validated = done
        return ValidationMetrics(done, loss, perplexity(loss), time.perf_counter() - start, tokens, samples)

    def _nothing(self) -> DataError:
        return DataError(
            "no row of the validation data can be used: all were dropped for their length (data.overlong), or are in "
            f"{self.loader.quarantine.path} with their reasons."
        )


def perplexity(loss: float) -> float:
    """e to the power of a loss; infinite where that is beyond a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def build_validation(
    config: RunConfig,
    registry: Registry,
    processes: Processes,
    model: ModelFolders,
    templates: Templates,
    training: StepLoader,
) -> Validation | None:
    """What the config asks to validate on; None for nothing. Its rows become samples, and these micro-batches, as those
    of the training do.

    Args:
        templates, training: of the data that is trained on.

    Raises:
        LlavaError: as for the data that is trained on.
    """
    settings = config.validation
    if settings is None:
        return None
    builder = training.builder
    if settings.fraction is None:
        own = config.model_copy(update={"data": validation_data(config.data, settings, templates)})
        readers = open_readers(own, registry, processes)
        found = find_templates(own.data, readers, registry, builder.tokenizer, model)
        multimodal = builder.images is not None
        sources = build_sources(own.data, readers, found, multimodal=multimodal, name="the validation data")
    else:
        sources = held_out(builder.sources, settings.fraction)
    rows = spread_rows(len(sources), settings.max_samples)
    path, share, counted = config.output / QUARANTINE_FILE, training.share, "rows of the validation data"
    loader = StepLoader(
        replace(builder, sources=sources),
        lambda _: rows,
        len(rows),
        training.batching,
        Quarantine(path, config.data.max_bad_fraction, writes=share.writes, rows=counted),
        training.num_workers,
        share,
    )
    return Validation(loader, settings.every_steps)


def validation_data(data: DataConfig, settings: ValidationConfig, templates: Templates) -> DataConfig:
    """The data section of data sets to validate on: that of the training, but for what is theirs."""
    chats = None if templates.exported == TEXT.name else templates.exported
    return data.model_copy(
        update={
            "path": settings.path,
            "split": settings.split,
            "sources": settings.sources,
            "images": settings.images or data.images,
            "reader": settings.reader or data.reader,
            "template": data.template or chats,
        }
    )


def spread_rows(num_rows: int, most: int | None) -> IntArray:
    """Indices of at most so many rows, evenly spread, in order."""
    count = num_rows if most is None else min(most, num_rows)
    rows: IntArray = np.arange(count, dtype=np.int64) * num_rows // count
    return rows
