"""Packing: properties of the assignment, and batches against a slow construction in plain Python."""

from __future__ import annotations

from dataclasses import fields
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava_core.data.batch import NEWLINE, Batch, Counts, Example, Merge
from llava_core.data.packing import build_batch, lengthened, pack_evenly, pack_samples, pad_samples
from llava_core.errors import BadRow

PAD = 7
IMAGE_SIZE = 4
FEATURES = 2  # of a tile


@st.composite
def lengths_and_budget(draw, max_samples=40, max_length=60):
    lengths = draw(st.lists(st.integers(1, max_length), max_size=max_samples))
    return lengths, draw(st.integers(max(lengths, default=1), 2 * max_length))


@given(lengths_and_budget())
def test_every_sample_is_packed_once(case):
    lengths, budget = case
    packed = [index for pack in pack_samples(lengths, budget) for index in pack]
    assert sorted(packed) == list(range(len(lengths)))


@given(lengths_and_budget())
def test_no_pack_is_above_the_budget(case):
    lengths, budget = case
    assert all(sum(lengths[i] for i in pack) <= budget for pack in pack_samples(lengths, budget))


@given(lengths_and_budget())
def test_packs_and_their_samples_keep_the_order(case):
    packs = pack_samples(*case)
    assert all(pack == sorted(pack) for pack in packs)
    assert [pack[0] for pack in packs] == sorted(pack[0] for pack in packs)


@given(lengths_and_budget())
def test_no_two_packs_would_fit_together(case):
    """First-fit's own property; with it all packs but one are more than half full."""
    lengths, budget = case
    fill = sorted(sum(lengths[i] for i in pack) for pack in pack_samples(lengths, budget))
    assert len(fill) < 2 or fill[0] + fill[1] > budget


@given(lengths_and_budget(), st.integers(0, 5))
def test_even_packs_hold_every_sample_once_within_the_budget(case, more):
    lengths, budget = case
    most = len(pack_samples(lengths, budget)) + more
    packs = pack_evenly(lengths, budget, most) if most else []
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    assert len(packs) <= most
    assert all(sum(lengths[i] for i in pack) <= budget for pack in packs)


def shortest_longest(lengths: list[int], most: int) -> int:
    """The longest pack's length where it is least, by trying everything."""
    ways = product(range(most), repeat=len(lengths))
    return min(
        max(sum(n for n, pack in zip(lengths, way, strict=True) if pack == i) for i in range(most)) for way in ways
    )


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 3))
def test_even_packs_stay_within_their_bound(lengths, most):
    """At most 4/3 of the optimum (Graham 1969)."""
    packs = pack_evenly(lengths, sum(lengths), most)
    longest = max(sum(lengths[i] for i in pack) for pack in packs)
    assert 3 * longest <= 4 * shortest_longest(lengths, most)


def test_packs_of_many_samples_are_even_to_a_hundredth():
    lengths = [600 + 53 * i % 620 for i in range(128)]
    fills = [sum(lengths[i] for i in pack) for pack in pack_evenly(lengths, 10**6, 14)]
    assert len(fills) == 14
    assert 0.99 * 14 * max(fills) <= sum(lengths)


def fewest_packs(lengths: list[int], budget: int) -> int:
    """By trying everything: each sample into each open pack, or into a new one."""

    def place(index: int, room: tuple[int, ...]) -> int:
        if index == len(lengths):
            return len(room)
        found = [place(index + 1, (*room, budget - lengths[index]))]
        for slot, free in enumerate(room):
            if free >= lengths[index]:
                changed = (*room[:slot], free - lengths[index], *room[slot + 1 :])
                found.append(place(index + 1, changed))
        return min(found)

    return place(0, ())


@given(lengths_and_budget(max_samples=7, max_length=12))
def test_first_fit_decreasing_stays_within_its_bound(case):
    """At most 11/9 of the optimum and 6/9 (Dosa 2007; Johnson's constant is larger)."""
    lengths, budget = case
    assert 9 * len(pack_samples(lengths, budget)) <= 11 * fewest_packs(lengths, budget) + 6


@given(lengths_and_budget())
def test_packing_is_a_function_of_its_arguments(case):
    assert pack_samples(*case) == pack_samples(*case)


def test_longest_first():
    """6 of 3 + 3 and 4 + 2: in the order given, 2 + 3 would leave 4 and 3 alone."""
    assert pack_samples([2, 3, 4, 3], 6) == [[0, 2], [1, 3]]


def test_a_sample_above_the_budget_is_refused_with_both_numbers():
    with pytest.raises(BadRow, match=r"too_long: 9 tokens do not fit a micro-batch of 8 \(batch\.micro_tokens\)"):
        pack_samples([3, 9], 8)


@given(st.integers(0, 30), st.integers(1, 8))
def test_padded_micro_batches_are_consecutive(num_samples, micro_size):
    rows = pad_samples(num_samples, micro_size)
    assert [i for row in rows for i in row] == list(range(num_samples))
    assert all(len(row) == micro_size for row in rows[:-1])
    assert all(0 < len(row) <= micro_size for row in rows)


@st.composite
def examples(draw, merged=None):
    """One to four samples with up to two images each, of one or two tiles; any token but an image's may be supervised,
    the first too. All images' features follow one another, or none's do."""
    built = []
    merged = draw(st.booleans()) if merged is None else merged
    for number in range(draw(st.integers(1, 4))):
        tokens, supervised, image_starts, lengths = [], [], [], []
        for piece in range(draw(st.integers(1, 3))):
            if piece > 0:
                image_starts.append(len(tokens))
                lengths.append(draw(st.integers(1, 3)))
                tokens += [PAD] * lengths[-1]
                supervised += [False] * lengths[-1]
            text = draw(st.lists(st.tuples(st.integers(10, 99), st.booleans()), min_size=piece == 0, max_size=5))
            tokens += [token for token, _ in text]
            supervised += [label for _, label in text]
        tiles = sum(draw(st.integers(1, 2)) for _ in image_starts)
        pixels = torch.full((tiles, 3, IMAGE_SIZE, IMAGE_SIZE), number + 1.0) if image_starts else None
        rows = st.lists(st.integers(NEWLINE, tiles * FEATURES - 1), min_size=sum(lengths), max_size=sum(lengths))
        merge = Merge(torch.tensor(draw(rows)), tiles * FEATURES) if merged and image_starts else None
        built.append(
            Example(
                f"row-{number}",
                torch.tensor(tokens),
                torch.tensor(supervised),
                tuple(image_starts),
                pixels,
                tuple(lengths),
                merge,
            )
        )
    return built


def slow_visual_indices(samples: list[Example], image_index: list[int]) -> dict[str, object]:
    """The fields that say what each visual token is, from their places in order."""
    rows, features = [], 0
    for sample in samples:
        if sample.merge is not None:
            rows += [row if row == NEWLINE else features + row for row in sample.merge.rows.tolist()]
            features += sample.merge.num_features
    if not features:
        return {"image_index": torch.tensor(image_index, dtype=torch.int64), "feature_index": None}
    found = [(place, row) for place, row in zip(image_index, rows, strict=True) if row != NEWLINE]
    newlines = [place for place, row in zip(image_index, rows, strict=True) if row == NEWLINE]
    return {
        "image_index": torch.tensor([place for place, _ in found] + newlines, dtype=torch.int64),
        "feature_index": torch.tensor([row for _, row in found], dtype=torch.int64),
    }


def slow_batch(samples: list[Example], padded: bool) -> dict[str, object]:
    """The fields of the batch, token by token."""
    longest = max(sample.length for sample in samples)
    out: dict[str, list] = {name: [] for name in ("tokens", "positions", "image_index", "label_index", "targets")}
    boundaries, labels_per_sample, images = [0], [], []
    for sample in samples:
        labels_per_sample.append(0)
        spans = zip(sample.image_starts, sample.visual_tokens, strict=True)
        image_positions = {start + i for start, length in spans for i in range(length)}
        for position in range(longest if padded else sample.length):
            here = len(out["tokens"])
            inside = position < sample.length
            out["tokens"].append(int(sample.tokens[position]) if inside else PAD)
            out["positions"].append(position)
            if position in image_positions:
                out["image_index"].append(here)
            if inside and position > 0 and bool(sample.supervised[position]):
                out["label_index"].append(here - 1)
                out["targets"].append(int(sample.tokens[position]))
                labels_per_sample[-1] += 1
        boundaries.append(len(out["tokens"]))
        images += list(sample.pixels) if sample.pixels is not None else []
    num_tokens = sum(sample.length for sample in samples)
    counts = Counts(
        text_tokens=num_tokens - len(out["image_index"]),
        image_tokens=len(out["image_index"]),
        label_tokens=len(out["targets"]),
        pad_tokens=len(out["tokens"]) - num_tokens,
        samples=len(samples),
        images=sum(len(sample.image_starts) for sample in samples),
        tiles=len(images),
    )
    return {
        **{name: torch.tensor(values, dtype=torch.int64) for name, values in out.items()},
        **slow_visual_indices(samples, out["image_index"]),
        "visual_tokens": tuple(length for sample in samples for length in sample.visual_tokens),
        "cu_seqlens": torch.tensor(boundaries, dtype=torch.int32),
        "cu_seqlens_host": tuple(boundaries),
        "pixels": torch.stack(images) if images else torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE),
        "labels_per_sample": tuple(labels_per_sample),
        "counts": counts,
        "ids": tuple(sample.id for sample in samples),
    }


def assert_equal(batch: Batch, expected: dict[str, object]) -> None:
    assert {field.name for field in fields(batch)} == set(expected)
    for name, want in expected.items():
        got = getattr(batch, name)
        if isinstance(want, torch.Tensor):
            assert got.dtype == want.dtype, name
            assert torch.equal(got, want), name
        else:
            assert got == want, name


@given(examples())
def test_packed_batch(samples):
    assert_equal(build_batch(samples, pad_id=PAD, image_size=IMAGE_SIZE), slow_batch(samples, padded=False))


@given(examples())
def test_padded_batch(samples):
    batch = build_batch(samples, pad_id=PAD, image_size=IMAGE_SIZE, padded=True)
    assert_equal(batch, slow_batch(samples, padded=True))


@given(examples(), st.integers(0, 9))
def test_a_lengthened_batch_has_a_sample_of_padding_more(samples, missing):
    expected = slow_batch(samples, padded=False)
    length = expected["cu_seqlens_host"][-1]
    if missing:
        boundaries = (*expected["cu_seqlens_host"], length + missing)
        expected["tokens"] = torch.cat((expected["tokens"], torch.full((missing,), PAD)))
        expected["positions"] = torch.cat((expected["positions"], torch.arange(missing)))
        expected["cu_seqlens"], expected["cu_seqlens_host"] = torch.tensor(boundaries, dtype=torch.int32), boundaries
        expected["counts"] = expected["counts"] + Counts(pad_tokens=missing)
    assert_equal(lengthened(build_batch(samples, pad_id=PAD, image_size=IMAGE_SIZE), length + missing, PAD), expected)


@given(examples())
def test_labels_are_split_over_the_samples(samples):
    batch = build_batch(samples, pad_id=PAD, image_size=IMAGE_SIZE)
    assert sum(batch.labels_per_sample) == batch.counts.label_tokens == batch.targets.numel()
    assert batch.labels_per_sample == tuple(sample.num_labels for sample in samples)


@given(examples())
def test_a_batch_knows_where_its_images_start(samples):
    batch = build_batch(samples, pad_id=PAD, image_size=IMAGE_SIZE)
    offsets = batch.cu_seqlens_host
    assert batch.image_starts == [
        o + s for sample, o in zip(samples, offsets, strict=False) for s in sample.image_starts
    ]
    rows = [row for sample in samples if sample.merge is not None for row in sample.merge.rows.tolist()]
    assert batch.num_newlines == rows.count(NEWLINE)


@given(examples(merged=True), examples(merged=True))
def test_counts_of_two_batches_add_up(first, second):
    counts = [build_batch(s, pad_id=PAD, image_size=IMAGE_SIZE).counts for s in (first, second, first + second)]
    assert counts[0] + counts[1] == counts[2]
    assert counts[2].tokens == sum(sample.length for sample in first + second)


def test_inputs_are_not_written_to():
    sample = Example("a", torch.arange(10, 15), torch.tensor([True] * 5), (), None, ())
    batch = build_batch([sample], pad_id=PAD, image_size=IMAGE_SIZE)
    batch.tokens.zero_()
    batch.targets.zero_()
    assert sample.tokens.tolist() == [10, 11, 12, 13, 14]


def test_the_batch_moves_with_its_tensors():
    sample = Example("a", torch.arange(10, 15), torch.tensor([True] * 5), (), None, ())
    batch = build_batch([sample], pad_id=PAD, image_size=IMAGE_SIZE)
    moved = batch.to(torch.device("meta"))
    assert all(value.is_meta for value in vars(moved).values() if isinstance(value, torch.Tensor))
    assert moved.counts == batch.counts


def first_fit_decreasing(lengths: list[int], budget: int) -> list[list[int]]:
    """By its definition: every micro-batch is looked at for every sample."""
    packs: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [pack for pack in packs if sum(lengths[i] for i in pack) + lengths[index] <= budget]
        if not fitting:
            fitting = [[]]
            packs.append(fitting[0])
        fitting[0].append(index)
    return sorted(map(sorted, packs))


@given(lengths_and_budget())
def test_packs_are_those_of_first_fit_decreasing(case):
    assert pack_samples(*case) == first_fit_decreasing(*case)
