"""The learning rate over a run, as a share of its peak."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from 0, then the shape down to `final_fraction` at the end of the run.

    Step numbers start at 0. Step `s` of the warm-up has s / warmup_steps, so the first one moves nothing, and the last
    step of the run is just above the end value: transformers' get_cosine_schedule_with_warmup, which the original LLaVA
    used, counts so.
    """

    shape: Literal["cosine", "linear", "constant"]
    total_steps: int
    warmup_steps: int
    final_fraction: float = 0.0

    def scale(self, step: int) -> float:
        """The share of the peak learning rate at a step."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        if self.shape == "constant":
            return 1.0
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        fall = 0.5 * (1 + math.cos(math.pi * progress)) if self.shape == "cosine" else 1 - progress
        return self.final_fraction + (1 - self.final_fraction) * max(0.0, fall)


def warmup_steps(total_steps: int, *, fraction: float | None, steps: int | None) -> int:
    """Steps of warm-up: the number itself, or the fraction of the run, rounded up as transformers does."""
    if steps is not None:
        return steps
    return math.ceil(total_steps * fraction) if fraction is not None else 0
