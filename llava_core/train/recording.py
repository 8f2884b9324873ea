"""Where each step's numbers go."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from typing import TypeAlias

from rich.console import Console

from llava_core.config import RunConfig
from llava_core.plugins import Registry
from llava_core.train import report
from llava_core.train.metrics import MetricsLog, StepMetrics, Tracker, ValidationMetrics
from llava_core.train.prepare import Run

Metrics: TypeAlias = StepMetrics | ValidationMetrics


@contextmanager
def recording(run: Run, registry: Registry, console: Console, done: int) -> Iterator[Callable[[Metrics], None]]:
    """What takes the numbers of steps and validations: metrics.jsonl, the trackers and the bar of the first process."""
    if not run.processes.is_first:
        yield lambda _: None
        return
    config = run.config
    with ExitStack() as stack:
        log = stack.enter_context(closing(MetricsLog(config.output, done, validates_again=run.is_validation_due(done))))
        trackers = [stack.enter_context(closing(t)) for t in build_trackers(config, registry)]
        bar = stack.enter_context(report.progress_bar(console, run, done))

        def record(metrics: Metrics) -> None:
            log.log(metrics)
            track(trackers, metrics)
            if isinstance(metrics, StepMetrics):
                bar.update(metrics)
            else:
                report.print_validation(metrics, config.output.name, console)

        yield record


def build_trackers(config: RunConfig, registry: Registry) -> list[Tracker]:
    """The trackers that the config names."""
    return [registry.load("tracker", name)(config.output) for name in config.log.trackers]


def track(trackers: Sequence[Tracker], metrics: Metrics) -> None:
    """Pass the finite ones of these numbers on."""
    found = asdict(metrics)
    step = found.pop("step")
    numbers = {k: float(v) for k, v in found.items() if v is not None and math.isfinite(v)}
    for tracker in trackers:
        tracker.log(step, numbers)
