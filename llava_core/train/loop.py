"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from llava_core.config import RunConfig, to_yaml
from llava_core.data.examples import naming_killed_workers
from llava_core.data.loader import Step
from llava_core.engine.processes import Processes
from llava_core.engine.torch_engine import StepResult
from llava_core.errors import ConfigError, LlavaError
from llava_core.plan.of_run import expect, expectation_line, outcome_line
from llava_core.plugins import Registry
from llava_core.train import report, resume
from llava_core.train.agreement import agree
from llava_core.train.flops import step_flops
from llava_core.train.interrupt import StopRequest, stop_on_signals
from llava_core.train.lora import ADAPTER_FOLDER, export_adapter, seed_step
from llava_core.train.metrics import StepMetrics, ValidationMetrics
from llava_core.train.plots import plot_loss
from llava_core.train.prepare import EXPORT_FOLDER, Run, open_run, prepare
from llava_core.train.profiling import StepProfiler
from llava_core.train.recording import recording
from llava_core.train.saver import saving
from llava_core.train.schedule import is_due
from llava_core.weights.adapter_folder import is_adapter_folder
from llava_core.weights.export import export_model

if TYPE_CHECKING:
    from llava_core.plan.estimate import Estimate

RANK_TIMEOUT = timedelta(minutes=30)
"""How long a process waits for another: one may write a checkpoint or read a large file while the others wait."""


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
    config: RunConfig,
    registry: Registry | None = None,
    console: Console | None = None,
    *,
    brief: bool = False,
    processes: Processes | None = None,
    ends_process: bool = False,
) -> RunResult:
    """Run a config to its end, or until a signal asks to stop; then there is a checkpoint to go on from.

    Args:
        brief: print two lines in place of the plan and its table of kernels.
        processes: this process among those that train together, each of which calls this; None for one alone.
        ends_process: nothing is done after the run, so that SIGINT and SIGTERM are ignored from its good end on.

    Raises:
        LlavaError: whatever stops the run; what was written before stays.
    """
    registry, processes = registry or Registry.discover(), processes or Processes()
    console = (console or Console()) if processes.is_first else Console(quiet=True)
    hardware = open_run(config, registry, processes)
    with processes.joined(hardware, RANK_TIMEOUT, group_of_one=config.parallel.offload):
        run = prepare(config, registry, hardware, processes)
        if brief:
            report.print_summary(run, console)
            return train_prepared(run, registry, console, ends_process=ends_process)
        report.print_plan(run, console)
        expected = expect(run)
        console.print(f"memory: {expectation_line(expected)}", markup=False)
        estimate = None if isinstance(expected, str) else expected
        return train_prepared(run, registry, console, estimate, ends_process=ends_process)


def train_prepared(
    run: Run, registry: Registry, console: Console, expected: Estimate | None = None, *, ends_process: bool = False
) -> RunResult:
    """Go on from the newest checkpoint to the end, then export. Raises as `train_model`.

    Args:
        expected: what a step was estimated to need, to be compared with what it took.
        ends_process: as `train_model` takes it.
    """
    config = run.config
    done, notes = resume.resume(run)
    done_before = done
    for note in notes:
        console.print(note, markup=False)
    export = config.output / EXPORT_FOLDER
    if is_finished(run, done, export):
        console.print(f"the run is finished; its model is in {export}", markup=False)
        return RunResult(done, export, 0)
    if run.processes.is_first:
        config.output.mkdir(parents=True, exist_ok=True)
        (config.output / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    with stop_on_signals(then_ignore=ends_process) as stop, naming_killed_workers():
        done = run_steps(run, done, stop, registry, console)
        if run.processes.is_first:
            plot_loss(config.output)
        outcome = outcome_line(run, expected, done_before) if expected is not None else None
        if outcome is not None:
            console.print(outcome, markup=False)
        if stop.agreed:
            saved = "the state is saved. The same command goes on from there." if done else "nothing was saved."
            console.print(f"interrupted after step {done}; {saved}")
            return RunResult(done, None, stop.exit_code)
        recorded = config.log.profile_steps
        if recorded is not None and recorded[1] > done:  # a length in tokens does not tell it before
            console.print(f"log.profile_steps = {list(recorded)}: the run had only {done} steps", markup=False)
        # A signal that comes now finds the training done: what is left is finished, so that nothing is lost.
        try:
            export_run(run, export)
        except (OSError, LlavaError):
            if config.checkpoint.every_steps is None:
                resume.save(run, done)  # what was learnt must not be lost with the export
            raise
        console.print(f"exported to {export}", markup=False)
        return RunResult(done, export, 0)


def is_finished(run: Run, done: int, export: Path) -> bool:
    """Whether no step is left to take and all that a run leaves is there.

    Raises:
        ConfigError: an export is there and no checkpoint, so that its settings cannot be told to be the same.
    """
    if done == 0 and export.exists():
        raise ConfigError(
            f"{run.config.output} holds a finished run and no checkpoint: its model is in {export}. Name another "
            "output, or remove the folder to train afresh."
        )
    has_adapter = run.source.adapters is None or is_adapter_folder(run.config.output / ADAPTER_FOLDER)
    return run.is_over(done) and export.exists() and has_adapter


def run_steps(run: Run, done: int, stop: StopRequest, registry: Registry, console: Console) -> int:
    """Steps `done` to the end, or to the stop request. Returns the steps done, the last of which is saved: always
    where a signal stopped the run, at its end where it keeps checkpoints at all."""
    config, gather = run.config, run.processes.gather
    saved, shown = done, done > 0
    timed_steps = _timed(iter(run.loader))
    with ExitStack() as stack:
        saver = stack.enter_context(saving(run, RANK_TIMEOUT))
        record = stack.enter_context(recording(run, registry, console, done))
        backend = run.hardware.backend
        profiler = stack.enter_context(closing(StepProfiler(backend, config.output, config.log.profile_steps)))
        if run.validation is not None:
            run.validation.check()
        while True:
            # At once in a resumed run, where a signal kept the step that was saved from it.
            validate(run, done, stop, record)
            if saved < done and is_due(config.checkpoint.every_steps, done):
                saver.save(done)
                saved = done
            if run.is_over(done) or stop.agree(gather):
                break
            saver.settle()
            start, place = time.perf_counter(), run.place(done)
            step, data_seconds = next(timed_steps)
            done += 1
            if not step.batches:
                continue  # every row of the step was set aside
            if not shown and step.batches[0].ids:  # a filler has nothing to show
                shown = True
                report.print_first_sample(run, step, console)
            seed_step(run, done)
            profiler.before(done)
            result = run.engine.step(step.batches, run.schedule.scale(place), step.labelled)
            profiler.after(done)
            if is_due(config.log.every_steps, done) or run.is_over(done):
                record(measure(run, step, result, done, data_seconds, time.perf_counter() - start))
        # After the loop, not in it: a signal may come between any look at `stop` and the next. This look decides.
        stopped = stop.agree(gather)
        if saved < done and (stopped or config.checkpoint.every_steps is not None):
            saver.save_now(done)
    return done


def validate(run: Run, done: int, stop: StopRequest, record: Callable[[ValidationMetrics], None]) -> None:
    """Try the model on the validation data, if that is due after `done` steps; a stop request cuts it short."""
    if run.validation is not None and run.is_validation_due(done):
        found = run.validation.measure(run.engine, done, lambda: stop.agree(run.processes.gather))
        if found is not None:
            record(found)


def measure(run: Run, step: Step, result: StepResult, done: int, data_seconds: float, seconds: float) -> StepMetrics:
    """The numbers of a step."""
    counts, backend = step.counts, run.hardware.backend
    sharers = run.engine.mesh.layout.sharers if run.engine.mesh is not None else 1
    source, trainable = run.source, run.config.train.trainable
    flops = step_flops(source.spec, trainable, step.batches, source.adapters) / seconds / sharers
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
        tokens=run.loader.tokens,
        grad_norm=result.grad_norm,
        text_tokens_per_sec=counts.text_tokens / seconds,
        text_tokens=counts.text_tokens,
        image_tokens=counts.image_tokens,
        label_tokens=counts.label_tokens,
        pad_tokens=counts.pad_tokens,
        samples=counts.samples,
        overlong=step.num_overlong,
        epoch=run.loader.epoch + run.loader.position / run.loader.num_rows,
        mfu=flops / peak if peak else None,
        skipped=result.skipped,
    )


def export_run(run: Run, folder: Path) -> None:
    """The trained model as a Hugging Face folder, and after it the adapters, if there are any, in another.

    Raises:
        OSError, LlavaError: in every process, where one of them could not be written.
    """
    export = partial(
        export_model,
        run.engine.model,
        run.tokenizer,
        run.processor,
        run.template,
        folder,
        dtype=run.engine.model.compute_dtype,
        remote=run.source.remote,
        writes=run.processes.is_first,
        weights=run.engine.pipeline.whole_weights() if run.engine.pipeline is not None else None,
    )
    # One at a time: where the first process fails, the others must not be in the collectives of the next.
    agree(run.processes, export)
    if run.source.adapters is not None:
        agree(run.processes, partial(export_adapter, run, run.config.output / ADAPTER_FOLDER))


def _timed(steps: Iterator[Step]) -> Iterator[tuple[Step, float]]:
    while True:
        start = time.perf_counter()
        step = next(steps)
        yield step, time.perf_counter() - start
