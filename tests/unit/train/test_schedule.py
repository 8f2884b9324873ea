"""The learning rate over a run is transformers'."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    TrainingArguments,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from llava_core.train.schedule import Schedule, warmup_length

RANDOM = random.Random(0)
RUNS = [(total, RANDOM.randint(0, total)) for total in (1, 2, 7, *(RANDOM.randint(3, 400) for _ in range(12)))]


def transformers_scales(shape: str, total: int, warmup: int) -> list[float]:
    """The factor of each step, from a real scheduler that is stepped."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    if shape == "constant":
        scheduler = get_constant_schedule_with_warmup(optimizer, warmup)
    else:
        build = {"cosine": get_cosine_schedule_with_warmup, "linear": get_linear_schedule_with_warmup}[shape]
        scheduler = build(optimizer, warmup, total)
    scales = []
    for _ in range(total):
        scales.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return scales


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("total", "warmup"), RUNS)
def test_every_step_has_transformers_rate(shape: str, total: int, warmup: int) -> None:
    schedule = Schedule(shape, total, warmup)  # type: ignore[arg-type]
    ours = [schedule.scale(step) for step in range(total)]
    # The same formula in double precision; the operations are ordered differently, so not always the same bits.
    assert ours == pytest.approx(transformers_scales(shape, total, warmup), rel=1e-14, abs=1e-15)


@pytest.mark.parametrize("total", [1, 3, 33, 34, 100, 2181, 5197])
def test_a_warmup_fraction_is_rounded_as_transformers_does(total: int) -> None:
    # Called unbound, for TrainingArguments wants accelerate; a number of steps below 1 is a share of the run.
    expected = TrainingArguments.get_warmup_steps(SimpleNamespace(warmup_steps=0.03), total)  # type: ignore[arg-type]
    assert warmup_length(total, fraction=0.03, given=None) == expected


def test_warmup_steps_are_taken_as_they_are() -> None:
    assert warmup_length(100, fraction=None, given=7) == 7
    assert warmup_length(100, fraction=None, given=None) == 0


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_the_end_value_is_a_share_of_the_peak(shape: str) -> None:
    schedule = Schedule(shape, 50, 10, final_fraction=0.2)  # type: ignore[arg-type]
    assert schedule.scale(10) == 1.0
    assert schedule.scale(30) == pytest.approx(0.6)  # half-way between 1 and 0.2, for both shapes
    assert schedule.scale(50) == pytest.approx(0.2)
