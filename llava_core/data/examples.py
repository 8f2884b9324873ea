"""Rows of a data set to examples, in this process or in workers."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from llava_core.data.batch import Example
from llava_core.data.encoding import conversation_of, expanded
from llava_core.data.image_side import ImageSide
from llava_core.data.overlong import Encoded, Overlong, fit_each
from llava_core.data.readers.index import IntArray
from llava_core.data.records import EmbeddedImage, EncodedRecord, Record, Row, TokenRow, TokenSequence
from llava_core.data.sources import Place, Source, Sources
from llava_core.data.tokens import encode_whole
from llava_core.errors import BadRow, TrainingError
from llava_core.parent import end_with_parent

T = TypeVar("T")

ROWS_PER_MESSAGE = 8
"""Rows that a worker decodes before it hands them over; a message a row would cost more than the decoding of text."""


TRAIN_ON = "The last checkpoint is intact. If memory ran out, lower data.num_workers or batch.global_size."


@dataclass(frozen=True)
class Built:
    """What a row became.

    Attributes:
        examples: one as a rule; several pieces of a row that was split; none of one that was dropped.
        overlong: whether the row was longer than a sample may be.
        lengths: in tokens, of each of the row's sequences as they were before they were fitted.
    """

    examples: tuple[Example, ...]
    overlong: bool
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class ExampleBuilder:
    """Rows to examples. Has no state, so that any worker gives the same examples for the same row.

    Attributes:
        vocab_size: rows of the model's embedding: token ids of data that was tokenised elsewhere stay below.
        overlong: what becomes of a row of more than `max_length` tokens; None for what its reader says is usual.
    """

    sources: Sources
    tokenizer: Any
    images: ImageSide | None
    pad_id: int
    vocab_size: int
    max_length: int
    overlong: Overlong | None

    def build(self, place: Place, row: Row) -> Built:
        """The examples of one row.

        Raises:
            BadRow: the row cannot be used.
        """
        source = self.sources.sources[place.source]
        wholes = self._encode_ids(row) if isinstance(row, TokenRow) else [self._encode(source, row)]
        overlong = self.overlong or source.reader.usual_overlong
        pieces = fit_each(wholes, self.max_length, overlong)
        images = () if isinstance(row, TokenRow) else row.images
        return Built(
            examples=tuple(self._example(source, row.id, piece, images) for piece in pieces),
            overlong=any(whole.length > self.max_length for whole in wholes),
            lengths=tuple(whole.length for whole in wholes),
        )

    def _encode(self, source: Source, row: Record | EncodedRecord) -> Encoded:
        if row.images and self.images is None:
            raise BadRow("unexpected_image", "the row has an image, and the model has no vision tower.")
        if isinstance(row, EncodedRecord):
            if row.refused is not None:
                raise row.refused
            self._check_ids(row.sequence)
            visual_tokens = [self._visual_tokens(source, image) for image in row.images]
            return expanded(row.sequence, row.image_starts, visual_tokens=visual_tokens, pad_id=self.pad_id)
        assert source.template is not None  # of a source of text
        conversation = conversation_of(row, source.template, source.reader.content)
        visual_tokens = [self._visual_tokens(source, image) for image in row.images]
        return encode_whole(conversation, self.tokenizer, visual_tokens=visual_tokens, pad_id=self.pad_id)

    def _encode_ids(self, row: TokenRow) -> list[Encoded]:
        for sequence in row.sequences:
            self._check_ids(sequence)
        wholes = [Encoded(torch.from_numpy(s.tokens), torch.from_numpy(s.supervised), (), ()) for s in row.sequences]
        # One of several without a target is no fault of the others.
        return [whole for whole in wholes if whole.has_target] or wholes

    def _check_ids(self, sequence: TokenSequence) -> None:
        beyond = sequence.tokens[(sequence.tokens < 0) | (sequence.tokens >= self.vocab_size)]
        if beyond.size:
            raise BadRow(
                "unknown_token",
                f"the row holds the token {beyond[0]}, and the model's embedding has {self.vocab_size} rows: "
                "the data was made with another tokenizer",
            )

    def _visual_tokens(self, source: Source, image: str | EmbeddedImage) -> int:
        assert self.images is not None  # rows with images are refused otherwise
        assert source.images is not None
        return self.images.visual_tokens(partial(source.images.size, image))

    def _example(self, source: Source, id: str, piece: Encoded, images: Sequence[str | EmbeddedImage]) -> Example:
        """The sample with its own of the row's images."""
        pixels = merge = None
        if piece.image_starts:
            assert self.images is not None  # no slot otherwise
            assert source.images is not None
            own = images[piece.first_image :][: len(piece.image_starts)]
            pixels, merge = self.images.tiles([source.images.open(image) for image in own], piece.visual_tokens)
        return Example(id, piece.tokens, piece.supervised, piece.image_starts, pixels, piece.visual_tokens, merge)


@dataclass(frozen=True)
class Rejected:
    """A row that could not be used.

    Attributes:
        source, index: which of its source's rows, both counted from 0.
    """

    id: str
    index: int
    reason: str
    message: str
    source: int = 0


def decoded(builder: ExampleBuilder, rows: IntArray, num_workers: int) -> Iterator[Built | Rejected]:
    """The examples of these rows, in their order, by `num_workers` processes; by this one without any."""
    return in_workers(partial(_decode, builder), rows, num_workers)


def in_workers(work: Callable[[int], T], rows: IntArray, num_workers: int) -> Iterator[T]:
    """What `work` gives for each of these rows, in their order, by `num_workers` processes; by this one without any."""
    loader = DataLoader(
        _Rows(work, rows),
        batch_size=None,
        num_workers=num_workers,
        generator=torch.Generator(),  # its own, so that starting workers does not draw from the run's random state
        worker_init_fn=partial(_start_worker, os.getpid()),
    )
    for group in loader:
        yield from group


@contextmanager
def naming_killed_workers(remedy: str = TRAIN_ON) -> Iterator[None]:
    """Around whatever runs while workers decode: PyTorch reports a killed one from a signal handler, wherever the
    process that started it happens to be.

    Args:
        remedy: what to do about it, as sentences.

    Raises:
        TrainingError: a decoding process was killed, e.g. for want of memory.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):  # PyTorch has no class of its own for this
            raise
        raise TrainingError(f"{error} {remedy}") from error


class _Rows(Dataset[list[T]], Generic[T]):
    """Groups of rows, for PyTorch's loader to hand to its workers."""

    def __init__(self, work: Callable[[int], T], rows: IntArray) -> None:
        self.work = work
        self.rows = rows

    def __len__(self) -> int:
        return -(-len(self.rows) // ROWS_PER_MESSAGE)

    def __getitem__(self, group: int) -> list[T]:
        rows = self.rows[group * ROWS_PER_MESSAGE : (group + 1) * ROWS_PER_MESSAGE]
        return [self.work(int(row)) for row in rows]


def read_or_reject(sources: Sources, place: Place) -> Row | Rejected:
    """The row at this place, or why it cannot be read."""
    try:
        return sources.sources[place.source].reader.read(place.row)
    except BadRow as bad:  # a row that is too broken to tell its own id
        return Rejected(f"row-{place.row}", place.row, bad.reason, bad.message, place.source)


def build_or_reject(builder: ExampleBuilder, place: Place, row: Row) -> Built | Rejected:
    """The examples of a row, or why there are none."""
    try:
        return builder.build(place, row)
    except BadRow as bad:
        return Rejected(row.id, place.row, bad.reason, bad.message, place.source)


def _decode(builder: ExampleBuilder, index: int) -> Built | Rejected:
    place = builder.sources.find(index)
    row = read_or_reject(builder.sources, place)
    return row if isinstance(row, Rejected) else build_or_reject(builder, place, row)


def _start_worker(trainer: int, _: int) -> None:
    """A terminal and some schedulers signal the whole process group; the trainer needs data to finish its step. And
    PyTorch's own watch for a dead trainer begins too late to see one that died while the worker started."""
    end_with_parent(trainer, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
