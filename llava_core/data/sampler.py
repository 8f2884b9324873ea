"""The order in which an epoch visits the rows: a pure function of the seed, so nothing is saved to repeat it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from llava_core.data.length_groups import length_grouped_order, usual_mega_batch_mult
from llava_core.data.readers.index import IntArray

Order = Literal["shuffled", "sequential", "modality_length", "length_grouped"]

GROUPED_ORDERS: tuple[Order, ...] = ("modality_length", "length_grouped")
"""Those that need a `Grouping`."""


@dataclass(frozen=True)
class Grouping:
    """How rows are grouped.

    Attributes:
        lengths: a row's number of words, negative for a row without images, never 0.
        micro_size: rows of a micro-batch on one device.
        num_chunks: micro-batches of an optimizer step over all devices.
        mega_batch_mult: steps of a group of `length_grouped`; None for `usual_mega_batch_mult`.
    """

    lengths: Sequence[int]
    micro_size: int
    num_chunks: int
    mega_batch_mult: int | None = None

    @property
    def step_size(self) -> int:
        """Rows of an optimizer step."""
        return self.micro_size * self.num_chunks


def epoch_order(order: Order, num_rows: int, seed: int, epoch: int, grouping: Grouping | None = None) -> IntArray:
    """The rows' indices in the order of an epoch: [N] int64."""
    if order == "sequential":
        return np.arange(num_rows, dtype=np.int64)
    generator = torch.Generator().manual_seed(_mix(seed, epoch))
    if order == "shuffled":
        shuffled: IntArray = torch.randperm(num_rows, generator=generator).numpy()
        return shuffled
    assert grouping is not None, f"{order} needs the rows' lengths"
    if order == "length_grouped":
        mult = grouping.mega_batch_mult or usual_mega_batch_mult(num_rows, grouping.step_size)
        return length_grouped_order(grouping.lengths, mult * grouping.step_size, generator)
    return np.array(modality_length_order(grouping, generator), dtype=np.int64)


def modality_length_order(grouping: Grouping, generator: torch.Generator) -> list[int]:
    """Steps of one modality and of similar lengths, in random order, as the original LLaVA's trainer forms them.

    Its quirks are kept, for the same rows then meet in the same steps: the last megabatch of each modality, full or
    not, goes into one mixed batch at the end, and where all rows are text their chunks are not evened out.
    Source: haotian-liu/LLaVA, llava/train/llava_trainer.py, LengthGroupedSampler.
    """
    lengths = grouping.lengths
    assert all(lengths), "a length of zero has no modality"
    with_image = [i for i, length in enumerate(lengths) if length > 0]
    text_only = [i for i, length in enumerate(lengths) if length < 0]
    if not with_image or not text_only:
        return [i for megabatch in _megabatches(lengths, grouping, generator) for i in megabatch]
    image_batches = _subset_megabatches(with_image, grouping, generator)
    text_batches = _subset_megabatches(text_only, grouping, generator)
    whole = image_batches[:-1] + text_batches[:-1]
    shuffled = [whole[i] for i in torch.randperm(len(whole), generator=generator).tolist()]
    mixed = sorted(image_batches[-1] + text_batches[-1])
    return [i for megabatch in (*shuffled, mixed) for i in megabatch]


def _subset_megabatches(rows: list[int], grouping: Grouping, generator: torch.Generator) -> list[list[int]]:
    lengths = [abs(grouping.lengths[row]) for row in rows]
    return [[rows[i] for i in megabatch] for megabatch in _megabatches(lengths, grouping, generator)]


def _megabatches(lengths: Sequence[int], grouping: Grouping, generator: torch.Generator) -> list[list[int]]:
    """Random groups the size of an optimizer step, each sorted and dealt to its micro-batches."""
    size = grouping.step_size
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    groups = [shuffled[start : start + size] for start in range(0, len(shuffled), size)]
    ordered = [sorted(group, key=lambda i: lengths[i], reverse=True) for group in groups]
    return [[i for chunk in _deal(group, lengths, grouping.num_chunks) for i in chunk] for group in ordered]


def _deal(rows: list[int], lengths: Sequence[int], num_chunks: int) -> list[list[int]]:
    """Chunks of equally many rows, each row to the shortest chunk that has room; strided where they cannot be equal."""
    if len(rows) % num_chunks:
        return [rows[start::num_chunks] for start in range(num_chunks)]
    capacity = len(rows) // num_chunks
    chunks: list[list[int]] = [[] for _ in range(num_chunks)]
    totals = [0.0] * num_chunks
    for row in rows:
        shortest = totals.index(min(totals))
        chunks[shortest].append(row)
        totals[shortest] = float("inf") if len(chunks[shortest]) == capacity else totals[shortest] + lengths[row]
    return chunks


def _mix(seed: int, epoch: int) -> int:
    """One seed from two, so that seed 1's first epoch is not seed 0's second (a Weyl step by 2⁶⁴ / φ)."""
    return (seed + epoch * 0x9E3779B97F4A7C15) % 2**63
