"""Several sources as one: how many rows of each an epoch takes, and which."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_core.data.mixing import Mixture
from llava_core.data.sampler import Order
from llava_core.errors import ConfigError

SHUFFLED: Order = "shuffled"


def by_source(rows: np.ndarray, lengths: list[int]) -> list[list[int]]:
    """An epoch's rows, counted within their sources."""
    starts = np.cumsum([0, *lengths])
    return [[int(row - start) for row in rows if start <= row < end] for start, end in pairwise(starts)]


def test_without_weights_every_row_is_taken_once() -> None:
    mixture = Mixture([3, 5], None, SHUFFLED, 7)
    assert mixture.rows(0).tolist() == mixture.rows(3).tolist() == list(range(8))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    order=st.sampled_from(["shuffled", "sequential"]),
    seed=st.integers(0, 2**63 - 1),
    data=st.data(),
)
def test_shares_are_exact_and_no_row_comes_again_before_all_were_there(
    lengths: list[int], order: Order, seed: int, data: st.DataObject
) -> None:
    weights = data.draw(st.lists(st.floats(0.2, 5), min_size=len(lengths), max_size=len(lengths)))
    total = sum(lengths)
    try:
        mixture = Mixture(lengths, weights, order, seed)
    except ConfigError:
        assert min(total * weight / sum(weights) for weight in weights) < 1
        return
    seen = [Counter[int]() for _ in lengths]
    for epoch in range(3):
        rows = mixture.rows(epoch)
        assert len(rows) == total
        assert rows.tolist() == Mixture(lengths, weights, order, seed).rows(epoch).tolist()
        for number, taken in enumerate(by_source(rows, lengths)):
            assert abs(len(taken) - total * weights[number] / sum(weights)) < 1
            seen[number].update(taken)
    for counts, length in zip(seen, lengths, strict=True):
        times = [counts[row] for row in range(length)]
        assert max(times) - min(times) <= 1, "each row as often as any other, but for the pass that is under way"


def test_weights_are_shares_of_any_sum() -> None:
    assert Mixture([10, 30], [1, 3], SHUFFLED, 0).counts == [10, 30]
    assert Mixture([10, 30], [0.5, 0.5], SHUFFLED, 0).counts == [20, 20]
    assert Mixture([1, 1, 1], [1, 1, 1.5], SHUFFLED, 0).counts == [1, 1, 1]


def test_what_is_left_after_rounding_goes_to_the_largest_remainders() -> None:
    assert Mixture([5, 5], [2, 1], SHUFFLED, 0).counts == [7, 3]  # 6.67 and 3.33
    assert Mixture([4, 3, 3], [1, 1, 1], SHUFFLED, 0).counts == [4, 3, 3]


def test_sequential_sources_alternate_in_proportion_and_go_on_in_the_next_epoch() -> None:
    mixture = Mixture([6, 3], [2, 1], "sequential", 0)
    assert mixture.rows(0).tolist() == [0, 6, 1, 2, 7, 3, 4, 8, 5]
    assert Mixture([4, 2], [1, 1], "sequential", 0).rows(0).tolist() == [0, 4, 1, 5, 2, 4]
    assert Mixture([4, 2], [1, 1], "sequential", 0).rows(1).tolist() == [3, 5, 0, 4, 1, 5]


def test_sources_of_one_length_and_passes_over_one_are_shuffled_apart() -> None:
    mixture = Mixture([50, 50], [1, 1], SHUFFLED, 3)
    orders = [tuple(taken) for epoch in range(3) for taken in by_source(mixture.rows(epoch), [50, 50])]
    assert len(set(orders)) == 6
    assert len({Mixture([50, 50], [1, 1], SHUFFLED, seed).rows(0).tobytes() for seed in range(5)}) == 5


def test_a_weight_too_small_for_one_row_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.sources\.1\.weight = 0\.01: an epoch of 4 rows has none for it"):
        Mixture([2, 2], [1, 0.01], SHUFFLED, 0)
