"""What a run tells the person who started it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import nn

from llava_core.backend import Selection
from llava_core.data.loader import Step
from llava_core.data.tokens import describe, render_supervised
from llava_core.model.freeze import PARTS, is_adapter, part_of
from llava_core.train.metrics import StepMetrics, ValidationMetrics
from llava_core.train.prepare import Run
from llava_core.train.schedule import Schedule
from llava_core.train.stages import pipeline_stages
from llava_core.train.validation import Validation
from llava_core.weights.load import outline


def print_plan(run: Run, console: Console) -> None:
    """Hardware, parameters, kernels with their reasons, data and steps."""
    hardware, stages = run.hardware, pipeline_stages(run.config, run.source.spec)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("backend", f"{hardware.backend.name}, {hardware.device_name}")
    if run.engine.mesh is not None:
        table.add_row("processes", f"{run.processes.size}: {run.engine.mesh.layout}")
    if len(stages) > 1:
        table.add_row("stages", f"of {', '.join(str(len(stage.layers)) for stage in stages)} layers")
    table.add_row("precision", str(run.engine.model.compute_dtype).removeprefix("torch."))
    table.add_row("host threads", str(torch.get_num_threads()))
    if saved := memory_settings(run):
        table.add_row("memory", saved)
    whole = dict(outline(run.source.spec, run.config.train.trainable, adapters=run.source.adapters).named_parameters())
    for part in PARTS:
        own = {name: weight for name, weight in whole.items() if part_of(name) == part}
        if own:
            table.add_row(part, described_part(run, part, own))
    table.add_row("data", described_data(run))
    if run.validation is not None:
        table.add_row("validation", described_validation(run, run.validation))
    table.add_row("tokenizer", describe(run.tokenizer))
    table.add_row("length", described_length(run))
    console.print(Panel(table, title="plan", title_align="left"))
    console.print(kernel_table(run.selections))


def described_part(run: Run, part: str, parameters: Mapping[str, nn.Parameter]) -> str:
    """How many parameters it has, and which learn."""
    size = sum(p.numel() for name, p in parameters.items() if not is_adapter(name))
    added = sum(p.numel() for name, p in parameters.items() if is_adapter(name))
    if added:
        assert run.source.adapters is not None
        kind, given = "DoRA" if run.source.adapters.dora else "LoRA", run.source.adapters.parts[part]
        return f"{size:,} parameters, frozen; {added:,} of {kind}, rank {given.rank}, alpha {given.alpha}, trained"
    learns = "trained" if part in run.config.train.trainable else "frozen"
    learns += ", fresh" if part == "projector" and run.source.fresh_projector else ""
    return f"{size:,} parameters, {learns}"


def memory_settings(run: Run) -> str:
    """What is computed again and what is kept on the host; empty for nothing."""
    train, said = run.config.train, []
    if train.recompute != "none":
        layers = "all" if train.recompute_layers is None else f"the first {train.recompute_layers}"
        said.append(f"recompute {train.recompute} in {layers} of {run.source.spec.text.num_layers} layers")
    said += ["activations on the host"] * train.offload_activations
    said += ["weights, gradients and optimizer on the host"] * run.config.parallel.offload
    return ", ".join(said)


def print_summary(run: Run, console: Console) -> None:
    """The plan in two lines, without the kernels."""
    hardware, whole = run.hardware, outline(run.source.spec, run.config.train.trainable, adapters=run.source.adapters)
    sizes = [p.numel() for p in whole.parameters()]
    learning = sum(p.numel() for p in whole.parameters() if p.requires_grad)
    precision = str(run.engine.model.compute_dtype).removeprefix("torch.")
    console.print(f"{learning:,} of {sum(sizes):,} parameters learn, on {hardware.backend.name} in {precision}")
    console.print(f"{described_length(run)}, from {described_data(run)}")


def described_length(run: Run) -> str:
    """How long the run trains, and in what steps."""
    schedule, samples = run.schedule, run.config.batch.global_size
    return f"{schedule.total:,} {schedule.unit}{' in steps' if schedule.unit == 'tokens' else ''} of {samples} samples"


def described_data(run: Run) -> str:
    """The rows of each source and their template; which source is which where there are several."""
    sources, data = run.loader.builder.sources.sources, run.config.data
    lines = []
    for source, given in zip(sources, data.inputs, strict=True):
        name = f"{given.path.name}: " if len(sources) > 1 else ""
        how = "token ids" if source.template is None else f"template {source.template.name}"
        weight = "" if given.weight is None else f", weight {given.weight:g}"
        lines.append(f"{name}{source.num_rows:,} rows, {how}{weight}")
    return "\n".join(lines)


def described_validation(run: Run, validation: Validation) -> str:
    """What is validated on, and when."""
    settings, total = run.config.validation, len(validation.loader.builder.sources)
    assert settings is not None
    held_out = "" if settings.fraction is None else " held out of the data"
    rows = f"{validation.loader.num_rows:,} of {total:,}" if validation.loader.num_rows < total else f"{total:,}"
    often = "" if settings.every_steps is None else f"every {settings.every_steps:,} steps and "
    return f"{rows} rows{held_out}, {often}at the end"


def print_validation(metrics: ValidationMetrics, title: str, console: Console) -> None:
    """One line for a validation."""
    console.print(
        f"{title}: validation after step {metrics.step}  loss {metrics.validation_loss:.3f}  perplexity "
        f"{metrics.validation_perplexity:.2f}  of {metrics.validation_label_tokens:,} tokens",
        markup=False,
    )


def kernel_table(selections: Mapping[str, Selection]) -> Table:
    """Which kernel each place in the model got, and why not another."""
    table = Table(title="kernels", title_justify="left")
    for column in ("place", "kernel", "not chosen, and why"):
        table.add_column(column, overflow="fold")
    for site, selection in selections.items():
        table.add_row(
            site, selection.kernel.name, Text("\n".join(f"{name}: {why}" for name, why in selection.rejected))
        )
    return table


def print_first_sample(run: Run, step: Step, console: Console) -> None:
    """The first sample decoded with its supervised part marked, and the first step's counts."""
    batch = step.batches[0]
    end = batch.cu_seqlens_host[1]
    tokens = batch.tokens[:end]
    supervised = tokens != tokens  # all False, of the right shape
    own_labels = batch.label_index[: batch.labels_per_sample[0]]
    supervised[own_labels + 1] = True
    starts = [start for start in batch.image_starts if start < end]
    text = render_supervised(run.tokenizer, tokens, supervised, starts, batch.visual_tokens[: len(starts)])
    console.print(Panel(text, title=Text(f"first sample, {batch.ids[0]}; ⟦supervised⟧"), title_align="left"))
    counts = step.counts
    console.print(
        f"first step: {counts.samples} samples in {step.labelled.batches} micro-batches, {counts.text_tokens} text, "
        f"{counts.image_tokens} image, {counts.label_tokens} supervised, {counts.pad_tokens} padding tokens"
    )


@contextmanager
def progress_bar(console: Console, run: Run, done: int) -> Iterator[ProgressBar]:
    """A live bar; where the output is not a terminal, a line now and then instead."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[shown]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield ProgressBar(progress, console, run.schedule, run.place(done), run.config.output.name)


class ProgressBar:
    """Shows steps as they are done."""

    LINES = 10
    """How many lines a run prints where there is no terminal to draw a bar on."""

    def __init__(self, progress: Progress, console: Console, schedule: Schedule, place: int, title: str) -> None:
        self._progress, self._console, self._schedule, self._title = progress, console, schedule, title
        self._task = progress.add_task(title, total=schedule.total, completed=place, shown="")
        self._lines = self._lines_until(place)

    def update(self, metrics: StepMetrics) -> None:
        """One step was done."""
        total, in_tokens = self._schedule.total, self._schedule.unit == "tokens"
        place = metrics.tokens if in_tokens else metrics.step
        shown = f"loss {metrics.loss:.3f}  grad {metrics.grad_norm:.2f}  {metrics.tokens_per_sec:,.0f} tok/s"
        self._progress.update(self._task, completed=place, shown=shown)
        lines, self._lines = self._lines, self._lines_until(place)
        if not self._console.is_terminal and self._lines > lines:
            how_far = f"{metrics.step}, {place:,}/{total:,} tokens" if in_tokens else f"{place}/{total}"
            self._console.print(f"{self._title}: step {how_far}  {shown}", markup=False)

    def _lines_until(self, place: int) -> int:
        return place * self.LINES // self._schedule.total
