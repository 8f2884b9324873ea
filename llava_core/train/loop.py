"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from llava_core.config import RunConfig, to_yaml
from llava_core.data.examples import naming_killed_workers
from llava_core.data.loader import Step
from llava_core.engine.torch_engine import StepResult
from llava_core.errors import ConfigError, LlavaError
from llava_core.plugins import Registry
from llava_core.train import report, resume
from llava_core.train.flops import step_flops
from llava_core.train.interrupt import StopRequest, stop_on_signals
from llava_core.train.metrics import MetricsLog, StepMetrics, Tracker
from llava_core.train.plots import plot_loss
from llava_core.train.prepare import EXPORT_FOLDER, Run, prepare
from llava_core.train.profiling import StepProfiler
from llava_core.weights.export import export_model


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        steps: optimizer steps done, those before a resume included.
        export: the Hugging Face folder; None where the run was interrupted.
        exit_code: 0, or 128 + the number of the signal that interrupted it.
    """

    steps: int
    export: Path | None
    exit_code: int


def train_model(
    config: RunConfig, registry: Registry | None = None, console: Console | None = None, *, brief: bool = False
) -> RunResult:
    """Run a config to its end, or until a signal asks to stop; then there is a checkpoint to go on from.

    Args:
        brief: print two lines in place of the plan and its table of kernels.

    Raises:
        LlavaError: whatever stops the run; what was written before stays.
    """
    registry = registry or Registry.discover()
    console = console or Console()
    run = prepare(config, registry)
    (report.print_summary if brief else report.print_plan)(run, console)
    done, notes = resume.resume(run)
    for note in notes:
        console.print(note, markup=False)
    export = config.output / EXPORT_FOLDER
    if export.exists() and done in (0, run.schedule.total_steps):
        return finished_before(run, done, export, console)
    config.output.mkdir(parents=True, exist_ok=True)
    (config.output / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    with stop_on_signals() as stop, naming_killed_workers():
        done = run_steps(run, done, stop, registry, console)
        plot_loss(config.output)
        if stop:
            saved = "the state is saved. The same command goes on from there." if done else "nothing was saved."
            console.print(f"interrupted after step {done}; {saved}")
            return RunResult(done, None, stop.exit_code)
        # A signal that comes now finds the training done: what is left is finished, so that nothing is lost.
        try:
            export_run(run, export)
        except (OSError, LlavaError):
            if config.checkpoint.every_steps is None:
                resume.save(run, done)  # what was learnt must not be lost with the export
            raise
        console.print(f"exported to {export}", markup=False)
        return RunResult(done, export, 0)


def finished_before(run: Run, done: int, export: Path, console: Console) -> RunResult:
    """The result of a run whose export is there already.

    Raises:
        ConfigError: it kept no checkpoint, so that its settings cannot be told to be the same.
    """
    if done == run.schedule.total_steps:
        console.print(f"the run is finished; its model is in {export}", markup=False)
        return RunResult(done, export, 0)
    raise ConfigError(
        f"{run.config.output} holds a finished run and no checkpoint: its model is in {export}. Name another output, "
        "or remove the folder to train afresh."
    )


def run_steps(run: Run, done: int, stop: StopRequest, registry: Registry, console: Console) -> int:
    """Steps `done` to the end, or to the stop request. Returns the steps done, the last of which is saved: always
    where a signal stopped the run, at its end where it keeps checkpoints at all."""
    total, config = run.schedule.total_steps, run.config
    saved, shown = done, done > 0
    timed_steps = _timed(iter(run.loader))
    with ExitStack() as stack:
        log = stack.enter_context(closing(MetricsLog(config.output, done)))
        trackers = [stack.enter_context(closing(t)) for t in build_trackers(config, registry)]
        bar = stack.enter_context(report.progress_bar(console, total, done, config.output.name))
        backend = run.hardware.backend
        profiler = stack.enter_context(closing(StepProfiler(backend, config.output, config.log.profile_steps)))
        while done < total and not stop:
            start = time.perf_counter()
            step, data_seconds = next(timed_steps)
            done += 1
            if not step.batches:
                continue  # every row of the step was set aside
            if not shown:
                shown = True
                report.print_first_sample(run, step, console)
            profiler.before(done)
            result = run.engine.step(step.batches, run.schedule.scale(done - 1))
            profiler.after(done)
            if done % config.log.every_steps == 0 or done == total:
                metrics = measure(run, step, result, done, data_seconds, time.perf_counter() - start)
                log.log(metrics)
                track(trackers, metrics)
                bar.update(metrics)
            if is_due(config.checkpoint.every_steps, done):
                resume.save(run, done)
                saved = done
        # After the loop, not in it: a signal may come between any look at `stop` and the next.
        if saved < done and (stop or config.checkpoint.every_steps is not None):
            resume.save(run, done)
    return done


def measure(run: Run, step: Step, result: StepResult, done: int, data_seconds: float, seconds: float) -> StepMetrics:
    """The numbers of a step."""
    counts, backend = step.counts, run.hardware.backend
    flops = step_flops(run.source.spec, run.config.train.trainable, step.batches) / seconds
    peak = backend.peak_flops.get(run.engine.model.compute_dtype)
    memory = backend.memory.peak_bytes()
    backend.memory.reset_peak()
    return StepMetrics(
        lr=max(group["lr"] for group in run.engine.optimizer.param_groups),
        data_time=data_seconds,
        loss=result.loss,
        time=seconds,
        tflops=flops / 1e12,
        tokens_per_sec=counts.tokens / seconds,
        iter=done,
        memory=memory >> 20,
        step=done,
        grad_norm=result.grad_norm,
        text_tokens_per_sec=counts.text_tokens / seconds,
        text_tokens=counts.text_tokens,
        image_tokens=counts.image_tokens,
        label_tokens=counts.label_tokens,
        pad_tokens=counts.pad_tokens,
        samples=counts.samples,
        epoch=run.loader.epoch + run.loader.position / len(run.loader.builder.reader),
        mfu=flops / peak if peak else None,
        skipped=result.skipped,
    )


def export_run(run: Run, folder: Path) -> None:
    """The trained model as a Hugging Face folder."""
    export_model(
        run.engine.model,
        run.tokenizer,
        run.processor,
        run.template,
        folder,
        dtype=run.engine.model.compute_dtype,
    )


def build_trackers(config: RunConfig, registry: Registry) -> list[Tracker]:
    """The trackers that the config names."""
    return [registry.load("tracker", name)(config.output) for name in config.log.trackers]


def track(trackers: Sequence[Tracker], metrics: StepMetrics) -> None:
    """Pass a step's finite numbers on."""
    numbers = {k: float(v) for k, v in asdict(metrics).items() if v is not None and math.isfinite(v)}
    for tracker in trackers:
        tracker.log(metrics.step, numbers)


def is_due(every: int | None, done: int) -> bool:
    """Whether something that happens every so many steps happens after this one."""
    return every is not None and done % every == 0


def _timed(steps: Iterator[Step]) -> Iterator[tuple[Step, float]]:
    while True:
        start = time.perf_counter()
        step = next(steps)
        yield step, time.perf_counter() - start
