"""Examples to batches: which samples share a micro-batch, and how they are laid end to end."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from operator import itemgetter

import torch
from torch import Tensor

from llava_core.data.batch import NEWLINE, Batch, Counts, Example, Merge
from llava_core.errors import BadRow


def pack_samples(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of samples for each micro-batch, none above `budget` tokens.

    First-fit decreasing: the longest first, each into the first micro-batch with room; at most 11/9 of the optimum plus
    one (Johnson 1973). Micro-batches, and samples in them, keep the order of the step's samples.

    Raises:
        BadRow: a sample is longer than the budget.
    """
    packs: list[list[int]] = []
    room: dict[int, int] = {}  # of the micro-batches that the shortest sample still fits
    shortest = min(lengths, default=0)
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if length > budget:
            raise BadRow("too_long", f"{length} tokens do not fit a micro-batch of {budget} (batch.micro_tokens).")
        slot = next((s for s, free in room.items() if free >= length), None)
        if slot is None:
            slot = len(packs)
            packs.append([])
            room[slot] = budget
        packs[slot].append(index)
        room[slot] -= length
        if room[slot] < shortest:
            del room[slot]
    return _in_order(packs)


def pack_evenly(lengths: Sequence[int], budget: int, most: int) -> list[list[int]]:
    """As `pack_samples`, but into up to `most` micro-batches about equally long.

    The longest first, each into the shortest micro-batch (Graham 1969: the longest is at most 4/3 of the optimum); then
    the longest and the shortest exchange samples for as long as that brings them closer. Where this leaves one above
    the budget, which happens with few samples in each, they are as `pack_samples` has them.

    Args:
        most: not below what `pack_samples` needs.
    """
    packs: list[list[int]] = [[] for _ in range(most)]
    fills = [0] * most
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        shortest = fills.index(min(fills))
        packs[shortest].append(index)
        fills[shortest] += lengths[index]
    while True:
        longest, shortest = fills.index(max(fills)), fills.index(min(fills))
        exchange = _best_exchange(lengths, packs[longest], packs[shortest], fills[longest] - fills[shortest])
        if exchange is None:
            break
        given, taken, moved = exchange
        packs[longest] = [index for index in packs[longest] if index != given] + taken
        packs[shortest] = [index for index in packs[shortest] if index not in taken] + [given]
        fills[longest] -= moved
        fills[shortest] += moved
    if max(fills) > budget:
        return pack_samples(lengths, budget)
    return _in_order(pack for pack in packs if pack)


def _best_exchange(
    lengths: Sequence[int], longer: Sequence[int], shorter: Sequence[int], gap: int
) -> tuple[int, list[int], int] | None:
    """A sample of the longer pack for one of the shorter, or for none, that brings the two closest to each other: what
    is given, what is taken, and the tokens that move; None where nothing brings them closer."""
    takes = sorted([(0, []), *((lengths[index], [index]) for index in shorter)], key=itemgetter(0))
    best, least = None, gap
    for given in longer:
        place = bisect_left(takes, lengths[given] - gap / 2, key=itemgetter(0))  # half the gap should move
        for length, taken in takes[max(0, place - 1) : place + 1]:
            moved = lengths[given] - length
            if abs(gap - 2 * moved) < least:
                best, least = (given, taken, moved), abs(gap - 2 * moved)
    return best


def _in_order(packs: Iterable[list[int]]) -> list[list[int]]:
    """Micro-batches, and samples in them, in the order of the step's samples."""
    return sorted((sorted(pack) for pack in packs), key=lambda pack: pack[0])


def pad_samples(num_samples: int, micro_size: int) -> list[list[int]]:
    """Indices of samples for each padded micro-batch of `micro_size` rows, in order; the last may be smaller."""
    return [list(range(start, min(start + micro_size, num_samples))) for start in range(0, num_samples, micro_size)]


def build_batch(examples: Sequence[Example], *, pad_id: int, image_size: int, padded: bool = False) -> Batch:
    """The examples laid end to end; with `padded` each is lengthened to the longest.

    Padding follows a sample's own tokens, so under causal attention no token of the sample ever sees it, and no label
    lies on it.

    Args:
        image_size: height and width of the zero image that stands in where no example has an image.
    """
    longest = max(example.length for example in examples)
    spans = [longest if padded else example.length for example in examples]
    offsets = [0, *accumulate(spans)]
    tokens = torch.full((offsets[-1],), pad_id, dtype=torch.int64)
    labels, targets = [], []
    for example, offset in zip(examples, offsets, strict=False):
        tokens[offset : offset + example.length] = example.tokens
        predicted = example.supervised[1:].nonzero()[:, 0]  # the position before each supervised token
        labels.append(predicted + offset)
        targets.append(example.tokens[1:][predicted])
    images = [example.pixels for example in examples if example.pixels is not None]
    image_index, feature_index = _visual_indices(examples, offsets)
    return Batch(
        tokens=tokens,
        positions=torch.cat([torch.arange(span) for span in spans]),
        cu_seqlens=torch.tensor(offsets, dtype=torch.int32),
        cu_seqlens_host=tuple(offsets),
        pixels=torch.cat(images) if images else torch.zeros(1, 3, image_size, image_size),
        image_index=image_index,
        visual_tokens=tuple(length for example in examples for length in example.visual_tokens),
        feature_index=feature_index,
        label_index=torch.cat(labels),
        targets=torch.cat(targets),
        labels_per_sample=tuple(example.num_labels for example in examples),
        counts=_counts(examples, offsets[-1]),
        ids=tuple(example.id for example in examples),
    )


def filler_batch(pad_id: int, image_size: int) -> Batch:
    """A micro-batch without samples, so that every process runs the same modules as often as the others.

    It has one token, no label, and the zero image of a batch without images.
    """
    nothing = Example("", torch.tensor([pad_id]), torch.tensor([False]), (), None, ())
    batch = build_batch([nothing], pad_id=pad_id, image_size=image_size)
    return replace(batch, counts=Counts(pad_tokens=1), ids=())


def lengthened(batch: Batch, num_tokens: int, pad_id: int) -> Batch:
    """The micro-batch with padding at its end, a sample of its own, so that it has `num_tokens` tokens."""
    missing = num_tokens - batch.num_tokens
    assert missing >= 0, f"{batch.num_tokens} tokens in a micro-batch of at most {num_tokens}"
    if missing == 0:
        return batch
    boundaries = (*batch.cu_seqlens_host, num_tokens)
    return replace(
        batch,
        tokens=torch.cat((batch.tokens, torch.full((missing,), pad_id, dtype=batch.tokens.dtype))),
        positions=torch.cat((batch.positions, torch.arange(missing))),
        cu_seqlens=torch.tensor(boundaries, dtype=batch.cu_seqlens.dtype),
        cu_seqlens_host=boundaries,
        counts=batch.counts + Counts(pad_tokens=missing),
    )


def _visual_indices(examples: Sequence[Example], offsets: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """A batch's `image_index` and `feature_index`."""
    slots = [torch.zeros(0, dtype=torch.int64)]
    for example, offset in zip(examples, offsets, strict=False):
        spans = zip(example.image_starts, example.visual_tokens, strict=True)
        slots += [torch.arange(start, start + length) + offset for start, length in spans]
    image_index = torch.cat(slots)
    merges = [example.merge for example in examples if example.merge is not None]
    if not merges:
        return image_index, None
    rows = Merge.joined(merges).rows
    is_newline = rows == NEWLINE
    return torch.cat((image_index[~is_newline], image_index[is_newline])), rows[~is_newline]


def _counts(examples: Sequence[Example], num_positions: int) -> Counts:
    tokens = sum(example.length for example in examples)
    image_tokens = sum(example.image_tokens for example in examples)
    return Counts(
        text_tokens=tokens - image_tokens,
        image_tokens=image_tokens,
        label_tokens=sum(example.num_labels for example in examples),
        pad_tokens=num_positions - tokens,
        samples=len(examples),
        images=sum(len(example.image_starts) for example in examples),
        tiles=sum(len(example.pixels) for example in examples if example.pixels is not None),
    )
