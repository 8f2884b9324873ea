"""The learning rate over a run, as a share of its peak."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from llava_core.config import RunConfig
from llava_core.errors import ConfigError

Unit = Literal["steps", "tokens"]
"""What a run's length is counted in."""


def is_due(every: int | None, done: int) -> bool:
    """Whether something that happens every so many steps happens after this one."""
    return every is not None and done % every == 0


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from 0, then the shape down to `final_fraction` at the end of the run.

    A step's place is how many steps, or tokens, came before it. Within the warm-up its rate is place / warmup, so the
    first one moves nothing, and the last step of the run is just above the end value: transformers'
    get_cosine_schedule_with_warmup, which the original LLaVA used, counts so.

    Attributes:
        total: of the run, in the unit.
        unit: `steps` of the optimizer, or `tokens` of text and images that were trained on, without padding.
    """

    shape: Literal["cosine", "linear", "constant"]
    total: int
    warmup: int
    final_fraction: float = 0.0
    unit: Unit = "steps"

    def scale(self, place: int) -> float:
        """The share of the peak learning rate at a place, in the unit."""
        if place < self.warmup:
            return place / self.warmup
        if self.shape == "constant":
            return 1.0
        progress = (place - self.warmup) / max(1, self.total - self.warmup)
        fall = 0.5 * (1 + math.cos(math.pi * progress)) if self.shape == "cosine" else 1 - progress
        return self.final_fraction + (1 - self.final_fraction) * max(0.0, fall)


def build_schedule(config: RunConfig, steps_per_epoch: int) -> Schedule:
    """The learning rate over the steps, or the tokens, that the run will take."""
    train, settings = config.train, config.optimizer
    unit: Unit = "steps" if train.max_tokens is None else "tokens"
    limits = [train.max_tokens, train.max_steps, train.epochs and train.epochs * steps_per_epoch]
    total = min(limit for limit in limits if limit is not None)
    given = settings.warmup_steps if train.max_tokens is None else settings.warmup_tokens
    warmup = warmup_length(total, fraction=settings.warmup_fraction, given=given)
    if warmup > total:
        raise ConfigError(f"optimizer.warmup_{unit} = {warmup}: the run has only {total} {unit}.")
    recorded = config.log.profile_steps
    if unit == "steps" and recorded is not None and recorded[1] > total:
        raise ConfigError(f"log.profile_steps = {list(recorded)}: the run has only {total} steps.")
    return Schedule(settings.schedule, total, warmup, settings.final_fraction, unit)


def warmup_length(total: int, *, fraction: float | None, given: int | None) -> int:
    """Steps or tokens of warm-up: the number itself, or the fraction of the run, rounded up as transformers does."""
    if given is not None:
        return given
    return math.ceil(total * fraction) if fraction is not None else 0
