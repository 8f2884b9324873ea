"""Which rows of each step a process takes: all of them once, whole chunks, and of sorted rows about as many tokens; and
what processes with the same rows must agree on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_core.data.batch import Counts, Labelled
from llava_core.data.examples import Rejected
from llava_core.data.share import News, Share, exchange
from llava_core.errors import DataError


def taken(num_rows: int, step_size: int, chunk: int, count: int) -> list[np.ndarray]:
    """Of each share, which rows."""
    return [np.flatnonzero(Share(index, count).of(num_rows, step_size, chunk)) for index in range(count)]


@given(st.integers(0, 100), st.integers(1, 12), st.integers(1, 3), st.integers(1, 5))
def test_every_row_is_taken_once_and_chunks_stay_whole(num_rows: int, num_chunks: int, chunk: int, count: int) -> None:
    step_size = num_chunks * chunk
    shares = taken(num_rows, step_size, chunk, count)
    assert sorted(np.concatenate(shares).tolist()) == list(range(num_rows))
    owners = {(row // step_size, row % step_size // chunk): set() for row in range(num_rows)}
    for index, rows in enumerate(shares):
        for row in rows.tolist():
            owners[row // step_size, row % step_size // chunk].add(index)
    assert all(len(found) == 1 for found in owners.values())


@given(st.integers(1, 12), st.integers(1, 5))
def test_shares_of_a_step_differ_by_a_chunk_at_most(num_chunks: int, count: int) -> None:
    sizes = [rows.size for rows in taken(num_chunks, num_chunks, 1, count)]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 4), st.integers(1, 8))
def test_rows_sorted_by_length_are_dealt_evenly(pairs: int, count: int) -> None:
    """Where each row is one longer than the next and there are an even number for each, the sums are equal."""
    num_rows = 2 * pairs * count
    lengths = np.arange(num_rows, 0, -1)
    sums = {int(lengths[rows].sum()) for rows in taken(num_rows, num_rows, 1, count)}
    assert sums == {num_rows * (num_rows + 1) // 2 // count}


NEWS = News(0, Counts(text_tokens=90, samples=3), Labelled(), num_batches=1, num_good=3, num_overlong=0, rejected=())


def test_each_share_is_heard_once() -> None:
    second = replace(NEWS, index=1, num_good=2)
    share = Share(gather=lambda own: [own, second, own, second])
    assert exchange(share, NEWS) == [NEWS, second]


def test_processes_that_read_the_same_rows_must_find_the_same() -> None:
    """One of them has no connection to where the images are, say: the others would wait for micro-batches of it."""
    unread = Rejected("row7", 7, "broken_image", "cannot read 7.png: Input/output error")
    less = replace(NEWS, counts=Counts(text_tokens=60, samples=2), num_good=2, rejected=(unread,))
    share = Share(gather=lambda own: [own, less])
    with pytest.raises(DataError, match=r"row7: cannot read 7.png: Input/output error"):
        exchange(share, NEWS)
