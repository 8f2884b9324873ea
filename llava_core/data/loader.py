"""Rows of a data set to the micro-batches of each optimizer step, in an order that a resumed run repeats exactly."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from llava_core.data.batch import Batch, Counts, Example
from llava_core.data.image_store import ImageStore
from llava_core.data.images import ImageProcessor
from llava_core.data.packing import build_batch, pack_samples, pad_samples
from llava_core.data.quarantine import Quarantine
from llava_core.data.readers import Reader
from llava_core.data.records import Record
from llava_core.data.templates import Template, check_image_count
from llava_core.data.tokens import encode
from llava_core.errors import BadRow, DataError, TrainingError

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


@dataclass(frozen=True)
class Step:
    """What one optimizer step trains on: nothing, where every one of its rows was set aside."""

    batches: tuple[Batch, ...]

    @property
    def counts(self) -> Counts:
        """Of all its micro-batches."""
        return sum((batch.counts for batch in self.batches), Counts())


@dataclass(frozen=True)
class Batching:
    """How a step's samples become micro-batches; exactly one of the two sizes is set."""

    global_size: int
    micro_tokens: int | None
    micro_size: int | None
    pad_id: int
    image_size: int

    def split(self, examples: Sequence[Example]) -> tuple[Batch, ...]:
        """The micro-batches of one step's examples."""
        if self.micro_tokens is not None:
            groups = pack_samples([example.length for example in examples], self.micro_tokens)
        else:
            assert self.micro_size is not None
            groups = pad_samples(len(examples), self.micro_size)
        return tuple(
            build_batch(
                [examples[i] for i in group],
                pad_id=self.pad_id,
                image_size=self.image_size,
                padded=self.micro_size is not None,
            )
            for group in groups
        )


class StepLoader:
    """Steps of an endless series of epochs, from any position on.

    A step takes the next `global_size` rows of the epoch, the last step of an epoch what is left. Micro-batches never
    reach across a step, so the position is the whole state: there is nothing half-packed to carry over. An unusable row
    is listed in the quarantine and leaves its step one sample smaller; no other row takes its place.

    Args:
        order: the rows' indices of an epoch, by its number.
        num_workers: processes that decode; the steps are the same for any number.
    """

    def __init__(
        self,
        builder: ExampleBuilder,
        order: Callable[[int], list[int]],
        batching: Batching,
        quarantine: Quarantine,
        num_workers: int,
    ) -> None:
        if len(builder.reader) == 0:
            raise DataError("the data set has no rows.")
        self.builder = builder
        self.order = order
        self.batching = batching
        self.quarantine = quarantine
        self.num_workers = num_workers
        self.epoch = 0
        self.position = 0

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one epoch, the last of which may be smaller."""
        return -(-len(self.builder.reader) // self.batching.global_size)

    def __iter__(self) -> Iterator[Step]:
        """Steps from the current position on.

        Raises:
            TrainingError: too many rows are unusable.
            DataError: every row of an epoch is.
        """
        while True:
            any_usable = self.position > 0
            for step in self._epoch():
                any_usable |= bool(step.batches)
                yield step
            if not any_usable:
                raise DataError(f"no row of the data set can be used; the reasons are in {self.quarantine.path}.")
            self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """The position after the last step that was handed out, as JSON values."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "data": self.builder.reader.fingerprint,
            "quarantine": self.quarantine.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            DataError: the data set is another one.
        """
        then, now = dict(state["data"]), dict(self.builder.reader.fingerprint)
        if (then | {"path": ""}) != (now | {"path": ""}):  # a data set may be moved, not changed
            raise DataError(
                f"the checkpoint was made on {then}, this data set is {now}: the order of samples cannot be continued. "
                "Restore the file (images may be mended in place), or start afresh with another output folder."
            )
        self.epoch, self.position = state["epoch"], state["position"]
        self.quarantine.load_state_dict(state["quarantine"])

    def _epoch(self) -> Iterator[Step]:
        rows = self.order(self.epoch)[self.position :]
        results = _decoded(self.builder, rows, self.num_workers)
        for start in range(0, len(rows), self.batching.global_size):
            taken = list(islice(results, min(self.batching.global_size, len(rows) - start)))
            examples = self._keep_usable(taken)
            self.position += len(taken)
            yield Step(self.batching.split(examples) if examples else ())

    def _keep_usable(self, results: Sequence[Example | Rejected]) -> list[Example]:
        examples = [result for result in results if isinstance(result, Example)]
        self.quarantine.add_good(len(examples))
        for result in results:
            if isinstance(result, Rejected):
                self.quarantine.add(result.id, result.index, result.reason, result.message)
        self.quarantine.check()
        return examples


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


def _decoded(builder: ExampleBuilder, rows: Sequence[int], num_workers: int) -> Iterator[Example | Rejected]:
    loader = DataLoader(
        _Rows(builder, rows),
        batch_size=None,
        num_workers=num_workers,
        generator=torch.Generator(),  # its own, so that starting workers does not draw from the run's random state
        worker_init_fn=_leave_signals_to_the_trainer,
    )
    for group in loader:
        yield from group


def _leave_signals_to_the_trainer(_: int) -> None:
    """A terminal and some schedulers signal the whole process group; the trainer needs data to finish its step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
