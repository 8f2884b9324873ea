"""The largest micro-batch for which a device's memory suffices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Fit:
    """The answer.

    Attributes:
        samples: of the largest micro-batch that fits; 0 where none does.
        peak: bytes that it takes; of one sample where none fits.
        is_limit: it is all that there is, and more would fit.
    """

    samples: int
    peak: int
    is_limit: bool


def largest_fit(peak_of: Callable[[int], int], budget: int, guess: int, limit: int) -> Fit:
    """The most samples, up to `limit`, whose `peak_of` is within `budget` bytes.

    Memory grows with the samples nearly on a line, so each try but the first is read off the line through the last two;
    the answer is one that was tried, and so is one sample more.
    """
    tried: dict[int, int] = {}
    fits, fails = 0, limit + 1
    while fails - fits > 1:
        guess = min(max(guess, fits + 1), fails - 1)
        tried[guess] = peak_of(guess)
        if tried[guess] <= budget:
            fits = guess
        else:
            fails = guess
        guess = _on_line(tried, guess, budget)
    return Fit(fits, tried[fits or 1], is_limit=fits == limit)


def _on_line(tried: dict[int, int], last: int, budget: int) -> int:
    """Where the line through the last try and its nearest neighbour meets the budget; without one, one sample, through
    which the line is known best."""
    others = [samples for samples in tried if samples != last]
    if not others:
        return 1
    other = min(others, key=lambda samples: abs(samples - last))
    slope = (tried[last] - tried[other]) / (last - other)
    if slope <= 0:
        return last * 2
    return last + int((budget - tried[last]) // slope)
