"""The largest micro-batch: the last that fits, found in few tries."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llava_core.plan.fit import largest_fit


@given(
    fixed=st.integers(0, 10**6),
    sample=st.integers(1, 10**4),
    kink=st.integers(1, 50),
    limit=st.integers(1, 300),
    guess=st.integers(1, 300),
    budget=st.integers(0, 3 * 10**6),
)
def test_one_sample_more_would_not_fit(fixed: int, sample: int, kink: int, limit: int, guess: int, budget: int) -> None:
    def peak_of(samples: int) -> int:
        tried.append(samples)
        return fixed + sample * samples + sample * max(0, samples - kink)

    tried: list[int] = []
    fit = largest_fit(peak_of, budget, guess, limit)
    expected = max((n for n in range(1, limit + 1) if fixed + sample * (n + max(0, n - kink)) <= budget), default=0)
    assert (fit.samples, fit.is_limit) == (expected, expected == limit)
    assert fit.peak == peak_of(expected or 1)


def test_a_line_takes_few_tries() -> None:
    tried: list[int] = []
    fit = largest_fit(lambda n: tried.append(n) or 1000 + 7 * n, 2000, guess=4, limit=10**6)  # type: ignore[func-returns-value]
    assert (fit.samples, fit.peak) == (142, 1994)
    assert len(tried) <= 4
