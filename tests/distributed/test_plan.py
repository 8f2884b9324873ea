"""What is predicted of processes is what they take and send.

Tolerance: the simulation is within 0.1 % of what each process itself makes. Beside it the host's process group has a
buffer of its own in some exchanges, and frees others late: of these sizes up to 3 %. On a busy host it may show more,
never less (see `steady_peak`), so one of a few measurements must be what was planned.
"""

from __future__ import annotations

import multiprocessing
from collections import Counter
from typing import Any

import pytest
from torch import distributed

from llava_core.config import RunConfig
from llava_core.engine.processes import Processes
from llava_core.plan.estimate import Estimate, estimate
from llava_core.plan.step import PlannedStep
from tests.distributed.processes import run_processes
from tests.unit.plan.support import SPEC, Measured, measure, run_config, subject

ERROR = 0.05
STEPS, MEASUREMENTS = 4, 4

CASES: dict[str, dict[str, Any]] = {
    "shards": {"train": {"precision": "bf16"}},
    "shards, stage 1": {"train": {"trainable": ["projector"]}},
    "replicas": {"batch": {"global_size": 12}, "parallel": {"data": "replicate"}},
    "tensor": {"train": {"precision": "bf16"}, "parallel": {"tensor": 2}},
    "pipeline": {"train": {"precision": "bf16"}, "parallel": {"pipeline": 2}, "batch": {"global_size": 6}},
    "context": {"train": {"precision": "bf16"}, "parallel": {"context": 2}},
}


def measured(config: RunConfig) -> Measured:
    return measure(config, SPEC, Processes(distributed.get_rank(), distributed.get_world_size()), STEPS)


def predicted(config: RunConfig, size: int, rank: int) -> Estimate:
    planned = subject(config)
    layout = planned.check(size)
    return estimate(planned, layout, rank, PlannedStep.of(config, layout))


def predicted_apart(config: RunConfig, size: int, rank: int) -> Estimate:
    """In a process of its own, for PyTorch remembers which rank it had."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(predicted, (config, size, rank))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES])
def test_memory_and_exchanges_are_the_measured_ones(name: str) -> None:
    config = run_config(**CASES[name])
    planned = [predicted_apart(config, 2, rank) for rank in range(2)]
    for _ in range(MEASUREMENTS):
        real = run_processes(2, measured, config)
        assert [sent(found) for found in planned] == [one.sent for one in real]
        if all(one.peak <= found.peak * (1 + ERROR) for found, one in zip(planned, real, strict=True)):
            break
    assert [found.peak for found in planned] == pytest.approx([one.peak for one in real], rel=ERROR)


def sent(found: Estimate) -> dict[str, int]:
    """Planned exchanges of a step, by kind."""
    counts: Counter[str] = Counter()
    for collective in found.collectives:
        counts[collective.kind] += collective.count
    return dict(counts)
