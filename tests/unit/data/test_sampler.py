"""The order of an epoch: the original LLaVA's where it has one, and always a permutation that only the seed decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava_core.data.length_groups import length_grouped_order, usual_mega_batch_mult
from llava_core.data.sampler import Grouping, Order, epoch_order, modality_length_order

FOLDER = Path(__file__).parents[2] / "golden"
GOLDEN = json.loads((FOLDER / "modality_length_order.json").read_text())
LENGTH_GROUPED = json.loads((FOLDER / "length_grouped_order.json").read_text())
ORDERS: tuple[Order, ...] = ("shuffled", "sequential", "modality_length", "length_grouped")


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_modality_length_is_the_originals_index_for_index(case: dict[str, Any]) -> None:
    grouping = Grouping(case["lengths"], case["micro_size"], case["num_chunks"])
    generator = torch.Generator().manual_seed(case["seed"])
    assert modality_length_order(grouping, generator) == case["order"]


@pytest.mark.parametrize("case", LENGTH_GROUPED["cases"], ids=lambda case: case["name"])
def test_length_grouped_is_xtuners_index_for_index(case: dict[str, Any]) -> None:
    mult = case["mega_batch_mult"] or usual_mega_batch_mult(len(case["lengths"]), case["step_size"])
    assert mult * case["step_size"] == case["group_size"]
    generator = torch.Generator().manual_seed(case["seed"])
    assert length_grouped_order(case["lengths"], case["group_size"], generator).tolist() == case["order"]


groupings = st.builds(
    Grouping,
    mega_batch_mult=st.none() | st.integers(1, 6),
    lengths=st.lists(st.integers(-40, 40).filter(bool), min_size=1, max_size=70),
    micro_size=st.integers(1, 5),
    num_chunks=st.integers(1, 6),
)


@given(groupings, st.integers(0, 2**40), st.integers(0, 5))
@pytest.mark.parametrize("order", ORDERS)
def test_every_order_is_a_permutation_that_the_seed_decides(
    order: Order, grouping: Grouping, seed: int, epoch: int
) -> None:
    num_rows = len(grouping.lengths)
    first = epoch_order(order, num_rows, seed, epoch, grouping)
    torch.rand(3)  # the global generator has no part in it
    assert sorted(first) == list(range(num_rows))
    assert epoch_order(order, num_rows, seed, epoch, grouping).tolist() == first.tolist()


@given(groupings, st.integers(0, 2**40))
def test_all_steps_but_the_last_mixed_one_are_of_one_modality(grouping: Grouping, seed: int) -> None:
    order = epoch_order("modality_length", len(grouping.lengths), seed, 0, grouping)
    size = grouping.micro_size * grouping.num_chunks
    by_sign = {sign: sum(sign * n > 0 for n in grouping.lengths) for sign in (1, -1)}
    # The last megabatch of each modality is left over for the mixed end, even when it is full.
    whole = sum(max(0, -(-count // size) - 1) for count in by_sign.values())
    for start in range(0, whole * size, size):
        assert len({grouping.lengths[row] > 0 for row in order[start : start + size]}) == 1


@given(groupings, st.integers(0, 2**40))
def test_length_grouped_steps_are_of_one_modality_but_at_the_end(grouping: Grouping, seed: int) -> None:
    """And within a group of them no row is longer than the one before, but for the two rows that changed places."""
    lengths = grouping.lengths
    order = epoch_order("length_grouped", len(lengths), seed, 0, grouping)
    mult = grouping.mega_batch_mult or usual_mega_batch_mult(len(lengths), grouping.step_size)
    size = mult * grouping.step_size
    counts = [sum(n > 0 for n in lengths), sum(n < 0 for n in lengths)]
    whole = sum(-(-count // size) - 1 for count in counts) if all(counts) else 0
    for start in range(0, whole * size, size):
        group = [lengths[row] for row in order[start : start + size]]
        assert len({length > 0 for length in group[1:]}) < 2
        assert [abs(n) for n in group[1:]] == sorted((abs(n) for n in group[1:]), reverse=True)
    if whole:
        assert abs(lengths[order[0]]) == max(map(abs, lengths))


@pytest.mark.parametrize("mult", [1, 2, 4])
def test_a_group_has_as_many_steps_as_asked(mult: int) -> None:
    lengths = list(range(1, 65))
    order = epoch_order("length_grouped", 64, 0, 0, Grouping(lengths, 4, 2, mega_batch_mult=mult))
    # Each group runs from its longest row to its shortest, but for the first rows of two, which change places.
    rest = order.reshape(-1, 8 * mult)[:, 1:]
    assert (rest[:, :-1] > rest[:, 1:]).all()


@pytest.mark.parametrize("order", ["shuffled", "modality_length", "length_grouped"])
def test_epochs_and_seeds_differ(order: Order) -> None:
    lengths = [3 + i % 11 if i % 3 else -(2 + i % 7) for i in range(200)]
    grouping = Grouping(lengths, 4, 2, mega_batch_mult=4)
    orders = [epoch_order(order, 200, seed, epoch, grouping) for seed in range(4) for epoch in range(4)]
    assert len({tuple(rows) for rows in orders}) == 16


def test_sequential_is_the_files_order() -> None:
    assert epoch_order("sequential", 5, 3, 2).tolist() == [0, 1, 2, 3, 4]


def test_a_length_of_zero_is_our_own_bug() -> None:
    with pytest.raises(AssertionError, match="no modality"):
        modality_length_order(Grouping([1, 0], 1, 1), torch.Generator())
    with pytest.raises(AssertionError, match="no modality"):
        length_grouped_order([1, 0], 1, torch.Generator())
