"""`llava-core backends`: what hardware each plugin can drive, and with which kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from llava_core.backend import Backend
    from llava_core.model.spec import ModelSpec
    from llava_core.plugins import Registry


def backends(
    name: Annotated[str | None, typer.Argument(help="Show one backend's kernels, installed or not.")] = None,
) -> None:
    """Show each backend: available or the reason why not, its devices, and which kernels it would choose."""
    from rich.console import Console

    from llava_core.plugins import Registry

    registry, console = Registry.discover(), Console()
    if name is not None:
        backend = registry.load("backend", name)()
        console.print(_kernels(backend))
        console.print(_choice(backend))
        return
    console.print(_overview(registry))
    for failure in registry.failures:
        console.print(f"not loaded: {failure}", markup=False)
    console.print("llava-core backends NAME shows a backend's kernels.", style="dim")


def _overview(registry: Registry) -> Table:
    from rich.table import Table

    from llava_core.engine.hardware import probe_all

    table = Table(title="backends", title_justify="left")
    for column in ("backend", "available", "devices", "from"):
        table.add_column(column, overflow="fold")
    offers = registry.offers("backend")
    for name, probe in probe_all(registry).items():
        devices = "\n".join(
            f"{d.index}: {d.name}" + (f", {d.memory_bytes / 2**30:.0f} GiB" if d.memory_bytes else "")
            for d in probe.devices
        )
        available = f"yes: {probe.reason}" if probe.available else f"no: {probe.reason}"
        table.add_row(name, available, devices, offers[name].distribution)
    return table


def _kernels(backend: Backend) -> Table:
    """Every kernel with what keeps it from loading; whether it serves a request is decided per model."""
    from rich.table import Table

    from llava_core.backend import reference_kernels
    from llava_core.backend.kernels import is_installed

    table = Table(title=f"kernels of {backend.name}", title_justify="left")
    for column in ("op", "kernel", "priority", "deterministic", "installed"):
        table.add_column(column, overflow="fold")
    kernels = [*backend.kernels(), *reference_kernels()]
    for kernel in sorted(kernels, key=lambda k: (k.op, -k.priority)):
        missing = kernel.requires is not None and not is_installed(kernel.requires)
        installed = f"no: needs {kernel.requires}" if missing else "yes"
        table.add_row(kernel.op, kernel.name, str(kernel.priority), "yes" if kernel.deterministic else "no", installed)
    return table


def _choice(backend: Backend) -> Table:
    """What stage 2 of a LLaVA-1.5 7B would run on, in this backend's default precision."""
    from llava_core.engine.opset import Use, build_ops
    from llava_core.train.report import kernel_table

    use = Use(backend.precision.default, frozenset({"projector", "language"}), 2048, deterministic=False)
    _, selections = build_ops(_llava15_7b(), backend, use)
    table = kernel_table(selections)
    table.title = f"chosen for LLaVA-1.5 7B, stage 2, {str(use.dtype).removeprefix('torch.')}"
    return table


def _llava15_7b() -> ModelSpec:
    from llava_core.model.spec import ModelSpec, TextSpec, VisionSpec

    text = TextSpec("llama", 32000, 4096, 11008, 32, 32, 32, 128, 1e-5, 4096)
    return ModelSpec(text, VisionSpec("clip", 336, 14, 1024, 4096, 24, 16, "quick_gelu", 1e-5))
