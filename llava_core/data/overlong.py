"""Tokenised samples, and what becomes of one that is longer than `max_length`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from llava_core.errors import BadRow

Overlong = Literal["truncate", "drop", "split"]


@dataclass(frozen=True)
class Encoded:
    """A tokenised sample.

    Attributes:
        tokens: [T] int64; the visual tokens of each image hold the pad id.
        supervised: [T] bool; True where the token is a target; all False for a prompt.
        image_starts: the first position of each image that was kept, in order.
        visual_tokens: how many positions each of these takes.
        first_image: which of the row's images is the first of these.
    """

    tokens: Tensor
    supervised: Tensor
    image_starts: tuple[int, ...]
    visual_tokens: tuple[int, ...]
    first_image: int = 0

    @property
    def length(self) -> int:
        return self.tokens.numel()

    @property
    def images(self) -> Iterator[tuple[int, int]]:
        """Where each image starts and ends."""
        return ((start, start + length) for start, length in zip(self.image_starts, self.visual_tokens, strict=True))

    @property
    def has_target(self) -> bool:
        """Whether a token with a predecessor is there to train."""
        return bool(self.supervised[1:].any())

    def between(self, start: int, end: int) -> Encoded:
        """The part of these tokens, which no image reaches out of."""
        inside = [i for i, image_start in enumerate(self.image_starts) if start <= image_start < end]
        return Encoded(
            # Copies: a view would be pickled with all of the row.
            self.tokens[start:end].clone(),
            self.supervised[start:end].clone(),
            tuple(self.image_starts[i] - start for i in inside),
            tuple(self.visual_tokens[i] for i in inside),
            inside[0] if inside else 0,
        )


def fit(whole: Encoded, max_length: int, overlong: Overlong) -> tuple[Encoded, ...]:
    """The samples of at most `max_length` tokens that a row becomes; none where it is to be dropped.

    `split` gives pieces one after the other. Each starts with the token that the last one ended with, so that every
    target but those right after an image at a cut keeps the token that predicts it. A piece without targets is left
    out. No image is cut in two.

    Raises:
        BadRow: `no_supervised_token` if nothing is left to train; `too_long` if an image alone does not fit a piece.
    """
    if whole.length <= max_length or overlong == "truncate":
        return (truncated(whole, max_length),)
    if overlong == "drop":
        return ()
    pieces = [whole.between(start, end) for start, end in _pieces(whole, max_length)]
    kept = tuple(piece for piece in pieces if piece.has_target)
    if not kept:
        raise BadRow(
            "no_supervised_token", f"of {whole.length} tokens none is an answer's: give the row an answer, or remove it"
        )
    return kept


def fit_each(wholes: Sequence[Encoded], max_length: int, overlong: Overlong) -> tuple[Encoded, ...]:
    """What `fit` makes of each of a row's sequences. One that cannot be used is no fault of the others.

    Raises:
        BadRow: as `fit`, of the first that is refused, if nothing is left of the row.
    """
    kept: list[Encoded] = []
    refused: BadRow | None = None
    for whole in wholes:
        try:
            kept += fit(whole, max_length, overlong)
        except BadRow as bad:
            refused = refused or bad
    if refused and not kept:
        raise refused
    return tuple(kept)


def truncated(whole: Encoded, max_length: int) -> Encoded:
    """The start of a sample that fits, without an image that the cut would go through and all that follows it.

    Raises:
        BadRow: `no_supervised_token` if no token with a predecessor is left to train.
    """
    end = _end(whole, max_length)
    kept = whole.between(0, end) if end < whole.length else whole
    if not kept.has_target:
        raise BadRow(
            "no_supervised_token",
            f"of {whole.length} tokens, {end} fit into max_length {max_length}, and none of these is an answer's; "
            "raise max_length or shorten the question",
        )
    return kept


def _pieces(whole: Encoded, max_length: int) -> Iterator[tuple[int, int]]:
    """Where the pieces of a sample start and end."""
    start = 0
    while True:
        end = _end(whole, start + max_length)
        if end <= start:
            length = whole.visual_tokens[whole.image_starts.index(end)]
            raise BadRow("too_long", f"an image of {length} tokens does not fit max_length {max_length}: raise it")
        yield start, end
        if end == whole.length:
            return
        follows_image = any(image_start < end <= image_end for image_start, image_end in whole.images)
        # A piece of one token was only there to be repeated, and an image comes next that leaves no room for it.
        start = end if follows_image or end - 1 == start else end - 1


def _end(whole: Encoded, limit: int) -> int:
    """Where to end so as to fit and to leave no part of an image."""
    end = min(whole.length, limit)
    return next((start for start, image_end in whole.images if start < end < image_end), end)
