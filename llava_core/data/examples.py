"""Rows of a data set to examples, in this process or in workers."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from llava_core.data.batch import Example
from llava_core.data.image_store import ImageStore
from llava_core.data.images import ImageProcessor
from llava_core.data.readers import Reader
from llava_core.data.records import Record
from llava_core.data.templates import Template, check_image_count
from llava_core.data.tokens import encode
from llava_core.errors import BadRow, TrainingError

ROWS_PER_MESSAGE = 8
"""Rows that a worker decodes before it hands them over; a message a row would cost more than the decoding of text."""


@dataclass(frozen=True)
class ImageSide:
    """How a row's images become pixels."""

    store: ImageStore
    processor: ImageProcessor
    visual_tokens: int


@dataclass(frozen=True)
class ExampleBuilder:
    """Rows to examples. Has no state, so that any worker gives the same example for the same row."""

    reader: Reader
    template: Template
    tokenizer: Any
    images: ImageSide | None
    pad_id: int
    max_length: int

    def build(self, record: Record) -> Example:
        """The example of one row.

        Raises:
            BadRow: the row cannot be used.
        """
        if record.images and self.images is None:
            raise BadRow("unexpected_image", "the row has an image, and there is no image folder or no vision tower.")
        conversation = self.template.render(record.turns)
        check_image_count(conversation, len(record.images))
        visual_tokens = self.images.visual_tokens if self.images else 1
        encoded = encode(
            conversation,
            self.tokenizer,
            visual_tokens=visual_tokens,
            pad_id=self.pad_id,
            max_length=self.max_length,
        )
        kept = record.images[: len(encoded.image_starts)]
        pixels = None
        if self.images is not None and kept:
            pixels = torch.stack([self.images.processor(self.images.store.open(name)) for name in kept])
        return Example(record.id, encoded.tokens, encoded.supervised, encoded.image_starts, pixels, visual_tokens)


@dataclass(frozen=True)
class Rejected:
    """A row that could not be used."""

    id: str
    index: int
    reason: str
    message: str


def decoded(builder: ExampleBuilder, rows: Sequence[int], num_workers: int) -> Iterator[Example | Rejected]:
    """The examples of these rows, in their order, by `num_workers` processes; by this one without any."""
    loader = DataLoader(
        _Rows(builder, rows),
        batch_size=None,
        num_workers=num_workers,
        generator=torch.Generator(),  # its own, so that starting workers does not draw from the run's random state
        worker_init_fn=_leave_signals_to_the_trainer,
    )
    for group in loader:
        yield from group


@contextmanager
def naming_killed_workers() -> Iterator[None]:
    """Around whatever runs while workers decode: PyTorch reports a killed one from a signal handler, wherever the
    trainer happens to be.

    Raises:
        TrainingError: a decoding process was killed, e.g. for want of memory.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):  # PyTorch has no class of its own for this
            raise
        raise TrainingError(
            f"{error} The last checkpoint is intact. If memory ran out, lower data.num_workers or batch.global_size."
        ) from error


class _Rows(Dataset[list[Example | Rejected]]):
    """Groups of rows, for PyTorch's loader to hand to its workers."""

    def __init__(self, builder: ExampleBuilder, rows: Sequence[int]) -> None:
        self.builder = builder
        self.rows = rows

    def __len__(self) -> int:
        return -(-len(self.rows) // ROWS_PER_MESSAGE)

    def __getitem__(self, group: int) -> list[Example | Rejected]:
        rows = self.rows[group * ROWS_PER_MESSAGE : (group + 1) * ROWS_PER_MESSAGE]
        return [_build_or_reject(self.builder, row) for row in rows]


def _build_or_reject(builder: ExampleBuilder, row: int) -> Example | Rejected:
    row_id = f"row-{row}"  # for a row that is too broken to tell its own
    try:
        record = builder.reader.read(row)
        row_id = record.id
        return builder.build(record)
    except BadRow as bad:
        return Rejected(row_id, row, bad.reason, bad.message)


def _leave_signals_to_the_trainer(_: int) -> None:
    """A terminal and some schedulers signal the whole process group; the trainer needs data to finish its step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
