"""What a run of one process expects to need, and what it then needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llava_core.engine.hardware import HOST
from llava_core.errors import ConfigError
from llava_core.plan.report import size
from llava_core.plan.subject import Subject
from llava_core.train.metrics import read_metrics
from llava_core.train.prepare import Run

if TYPE_CHECKING:
    from llava_core.plan.estimate import Estimate


def expect(run: Run) -> Estimate | str:
    """The estimate of a full step, or why there is none."""
    if run.processes.size > 1:
        return f"of several processes `llava-core plan … --nproc {run.processes.size}` estimates it"
    backend = run.hardware.backend
    subject = Subject(
        run.config, run.source.spec, backend, run.engine.model.compute_dtype, type(backend).probe().devices
    )
    try:
        layout = subject.check(1)
    except ConfigError as error:
        return str(error)
    # It stands on parts of PyTorch that are not public, and runs what kernels a plugin brings: neither may keep a run
    # from starting that needs no estimate.
    try:
        from llava_core.plan.estimate import estimate
        from llava_core.plan.step import PlannedStep

        return estimate(subject, layout, 0, PlannedStep.of(run.config, layout))
    except Exception as error:
        return f"simulating a step raised {type(error).__name__}: {error}"


def expectation_line(expected: Estimate | str) -> str:
    """For the run's plan."""
    if isinstance(expected, str):
        return f"not estimated: {expected}"
    step = expected.step
    return (
        f"{size(expected.peak)} at the peak of a step, of {step.micro_tokens:,} tokens a micro-batch, all of them full"
    )


def outcome_line(run: Run, expected: Estimate, done_before: int) -> str | None:
    """How far the estimate was off the most that the steps after `done_before` took; None where that is not known:
    no step was recorded, or the host computed, which knows only whole processes."""
    if run.hardware.backend.device_type == HOST:
        return None
    rows = read_metrics(run.config.output)
    measured = 2**20 * max((row["memory"] for row in rows if row["step"] > done_before), default=0)
    if not measured:
        return None
    off = 100 * (expected.peak / measured - 1)
    return (
        f"memory: {size(measured)} at the peak, {size(expected.peak)} estimated for full micro-batches ({off:+.1f} %)"
    )
