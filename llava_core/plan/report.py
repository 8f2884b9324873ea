"""A plan as tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.table import Table

from llava_core.plan.kernels import FUSED
from llava_core.plan.memory import KINDS

if TYPE_CHECKING:
    from llava_core.plan.planning import Plan


def print_plan(plan: Plan, console: Console, *, parameters: bool = False) -> None:
    """The whole plan; with `parameters`, what the rank has of each of them, too."""
    for part in _parts(plan, parameters):
        console.print(part)


def size(num_bytes: float) -> str:
    """Bytes for a person."""
    units = (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
    unit, factor = next((u for u in units if abs(num_bytes) >= u[1]), ("B", 1))
    return f"{num_bytes / factor:,.2f} {unit}" if factor > 1 else f"{num_bytes:,.0f} B"


def fit_line(plan: Plan) -> str:
    """The largest micro-batch that fits, or why it is not known."""
    if plan.fit is None or plan.memory is None:
        return "largest micro-batch: not looked for, as the device's memory is not known; give it, e.g. --memory 64GiB"
    fit, length = plan.fit, plan.estimate.step.sample_tokens
    if fit.samples == 0:
        return f"not even one sample of {length:,} tokens fits {size(plan.memory)}: it takes {size(fit.peak)}"
    limit = ", which is all that a process has of a step" if fit.is_limit else ""
    return (
        f"largest micro-batch in {size(plan.memory)}: {fit.samples:,} samples, {fit.samples * length:,} tokens{limit}; "
        f"it takes {size(fit.peak)}"
    )


def _parts(plan: Plan, parameters: bool) -> Iterator[RenderableType]:
    yield _overview(plan)
    yield _sizes(plan)
    yield _memory(plan)
    yield fit_line(plan)
    if plan.estimate.layout.world_size > 1:
        yield _collectives(plan)
    if parameters:
        yield _parameters(plan)


def _overview(plan: Plan) -> Table:
    found, config = plan.estimate, plan.subject.config
    step, layout = found.step, found.layout
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("backend", plan.subject.backend.name + ("" if plan.subject.devices else ", which is not here"))
    table.add_row("kernels", ", ".join(f"{site} {kernel}" for site, kernel in found.kernels.items()))
    if FUSED in found.kernels.values():
        table.add_row("", "assumed, as the device is not here to say which it runs")
    table.add_row("processes", f"{layout.world_size:,}: {layout}; this is rank {found.rank}")
    table.add_row("precision", str(found.dtype).removeprefix("torch."))
    table.add_row(
        "step",
        f"{config.batch.global_size:,} samples of {step.sample_tokens:,} tokens; a process has {step.micro_batches:,} "
        f"micro-batches of {step.micro_samples:,} samples, {step.micro_tokens:,} tokens",
    )
    tokens = config.batch.global_size * step.sample_tokens
    table.add_row(
        "work", f"{tokens:,} tokens and {found.flops:.3g} FLOPs a step, {found.flops / layout.world_size:.3g} a process"
    )
    if config.train.compile:
        table.add_row("compiled", "planned as if it were not: what compiling saves depends on the compiler")
    return table


def _sizes(plan: Plan) -> Table:
    table = _titled("parameters", "part", "", "of the model", f"of rank {plan.estimate.rank}")
    sizes, adapters = plan.part_sizes(), plan.subject.adapters
    adapted = adapters.parts if adapters is not None else {}
    for part, trained, whole, own in sizes:
        learns = "adapters trained" if part in adapted else "trained" if trained else "frozen"
        table.add_row(part, learns, f"{whole:,}", f"{own:,}")
    table.add_row("all", "", f"{sum(row[2] for row in sizes):,}", f"{sum(row[3] for row in sizes):,}")
    return table


def _memory(plan: Plan) -> Table:
    found = plan.estimate
    table = _titled(f"memory of rank {found.rank}", "kind", "at the peak", "at most")
    for kind in KINDS:
        table.add_row(kind, size(found.memory_at_peak.get(kind, 0)), size(found.largest.get(kind, 0)))
    table.add_row("all", size(found.peak), "")
    return table


def _collectives(plan: Plan) -> Table:
    table = _titled(
        f"exchanges of rank {plan.estimate.rank} in a step", "kind", "axis", "processes", "times", "of tensors of"
    )
    for found in plan.estimate.collectives:
        table.add_row(found.kind, found.axis, f"{found.processes:,}", f"{found.count:,}", size(found.num_bytes))
    return table


def _parameters(plan: Plan) -> Table:
    table = _titled(f"parameters of rank {plan.estimate.rank}", "name", "whole", "its part", "dtype", "")
    for found in plan.estimate.parameters:
        shapes = (" x ".join(map(str, shape)) for shape in (found.shape, found.local_shape))
        table.add_row(found.name, *shapes, found.dtype, "trained" if found.trained else "frozen")
    return table


def _titled(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        is_number = number > 0 and column not in ("", "axis", "dtype", "whole", "its part")
        table.add_column(column, justify="right" if is_number else "left", overflow="fold")
    return table
