"""Samples that are too long: cut, dropped, or split so that every target is learnt once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from llava_core.data.overlong import Encoded, fit
from llava_core.errors import BadRow

LARGEST = 4


@st.composite
def samples(draw: st.DrawFn) -> Encoded:
    """Tokens that are their own positions, with images of one to four between them, and any of the text supervised."""
    texts = draw(st.lists(st.integers(0, 12), min_size=1, max_size=5))
    supervised: list[bool] = []
    starts, lengths = [], []
    for number, length in enumerate(texts):
        if number:
            starts.append(len(supervised))
            lengths.append(draw(st.integers(1, LARGEST)))
            supervised += [False] * lengths[-1]
        supervised += [draw(st.booleans()) for _ in range(length)]
    assume(any(supervised[1:]))
    return Encoded(torch.arange(len(supervised)), torch.tensor(supervised), tuple(starts), tuple(lengths))


def targets(sample: Encoded) -> list[tuple[int, int]]:
    """Each target with the token that predicts it."""
    return [(int(sample.tokens[i - 1]), int(sample.tokens[i])) for i in range(1, sample.length) if sample.supervised[i]]


@given(samples(), st.integers(LARGEST, 20))
def test_pieces_fit_and_learn_every_target_once(whole: Encoded, max_length: int) -> None:
    try:
        pieces = fit(whole, max_length, "split")
    except BadRow:
        pieces = ()  # every target follows an image that a cut is right behind
    learnt = [pair for piece in pieces for pair in targets(piece)]
    assert learnt == sorted(set(learnt)), "none twice, and in order"
    behind_images = {end for _, end in whole.images}
    assert {pair for pair in targets(whole) if pair[1] not in behind_images} <= set(learnt) <= set(targets(whole))
    for piece in pieces:
        assert piece.length <= max_length
        assert piece.tokens.tolist() == list(range(int(piece.tokens[0]), int(piece.tokens[0]) + piece.length))
        found = [int(piece.tokens[start]) for start in piece.image_starts]
        assert found == list(whole.image_starts[piece.first_image :][: len(found)])
        assert piece.visual_tokens == whole.visual_tokens[piece.first_image :][: len(found)]
        assert all(end <= piece.length for _, end in piece.images)


@pytest.mark.parametrize(("length", "max_length"), [(100, 33), (97, 33), (33, 33), (34, 33), (5, 2)])
def test_a_document_is_split_as_megatron_splits_it(length: int, max_length: int) -> None:
    """megatron-core's GPTDataset gives, of sequences of L inputs, tokens kL to (k+1)L, both of them."""
    whole = Encoded(torch.arange(length), torch.ones(length, dtype=torch.bool), (), ())
    inputs = max_length - 1
    expected = [list(range(start, min(start + inputs + 1, length))) for start in range(0, length - 1, inputs)]
    assert [piece.tokens.tolist() for piece in fit(whole, max_length, "split")] == expected


@pytest.mark.parametrize("overlong", ["truncate", "drop", "split"])
def test_what_fits_stays_whole(overlong: Any) -> None:
    whole = Encoded(torch.arange(5), torch.ones(5, dtype=torch.bool), (), ())
    (kept,) = fit(whole, 5, overlong)
    assert kept is whole


def test_a_dropped_row_gives_nothing() -> None:
    assert fit(Encoded(torch.arange(6), torch.ones(6, dtype=torch.bool), (), ()), 5, "drop") == ()


def test_pieces_without_targets_are_left_out() -> None:
    supervised = torch.tensor([False] * 12 + [True] * 2)
    pieces = fit(Encoded(torch.arange(14), supervised, (), ()), 5, "split")
    assert [piece.tokens.tolist() for piece in pieces] == [[8, 9, 10, 11, 12], [12, 13]]
    with pytest.raises(BadRow, match="no_supervised_token"):
        fit(Encoded(torch.arange(14), torch.zeros(14, dtype=torch.bool), (), ()), 5, "split")


def test_an_image_larger_than_a_piece_is_refused() -> None:
    whole = Encoded(torch.arange(12), torch.tensor([False] * 8 + [True] * 4), (2,), (6,))
    with pytest.raises(BadRow, match="too_long: an image of 6 tokens does not fit max_length 5"):
        fit(whole, 5, "split")


def test_a_piece_does_not_carry_its_row_along() -> None:
    """A worker sends a tensor with all of its storage."""
    whole = Encoded(torch.arange(1000), torch.ones(1000, dtype=torch.bool), (), ())
    for piece in (*fit(whole, 10, "split"), *fit(whole, 10, "truncate")):
        for tensor in (piece.tokens, piece.supervised):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes <= 80
