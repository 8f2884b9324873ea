"""`llava-core backends`: what hardware each plugin can drive, and with which kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

if TYPE_CHECKING:
    from rich.table import Table

    from llava_core.backend import Backend, Selection
    from llava_core.engine.opset import Use
    from llava_core.model.spec import ModelSpec
    from llava_core.plugins import Registry


def backends(
    name: Annotated[str | None, typer.Argument(help="Show this backend's kernels, and which a 7B would get.")] = None,
    patches: Annotated[
        bool, typer.Option("--patches", help="Show what this backend changes in other libraries, and why.")
    ] = False,
) -> None:
    """Show each backend: available or the reason why not, its devices, its kernels, and which would be chosen."""
    from rich.console import Console

    from llava_core.cli.patches import patch_table
    from llava_core.engine.hardware import build_backend, vendor_code
    from llava_core.errors import ConfigError
    from llava_core.plugins import Registry

    registry, console = Registry.discover(), Console()
    if name is None and patches:
        raise ConfigError("--patches is given without a backend; expected `llava-core backends NAME --patches`")
    if name is None:
        console.print(_overview(registry))
        for failure in registry.failures:
            console.print(f"not loaded: {failure}", markup=False)
        console.print("`llava-core backends NAME` says why each kernel would be chosen or not.", style="dim")
        return
    backend = build_backend(name, registry)
    with vendor_code(name, registry, "listing its patches" if patches else "listing its kernels"):
        tables = [patch_table(p) for p in backend.patches()] if patches else [_kernels(backend), _choice(backend)]
    if not tables:
        console.print(f"{name} patches no other library.")
    for table in tables:
        console.print(table)


def _overview(registry: Registry) -> Table:
    """A row a backend; of each op's kernels the one that a 7B would get is marked."""
    from rich.table import Table

    from llava_core.engine.hardware import build_backend, probe_all, vendor_code
    from llava_core.errors import PluginError

    table = Table(title="backends", title_justify="left", show_lines=True)
    for column in ("backend", "available, devices", "kernels, the chosen one in [brackets]"):
        table.add_column(column.replace("[", r"\["), overflow="fold")
    for name, probe in probe_all(registry).items():
        devices = "".join(
            f"\n{d.index}: {d.name}" + (f", {d.memory_bytes / 2**30:.0f} GiB" if d.memory_bytes else "")
            for d in probe.devices
        )
        try:
            backend = build_backend(name, registry)
            with vendor_code(name, registry, "listing its kernels"):
                kernels = _kernels_by_op(backend)
        except PluginError as error:
            kernels = "" if error.reason == probe.reason else error.reason
        available = f"{'yes' if probe.available else 'no'}: {probe.reason}"
        table.add_row(name, escape(available + devices), escape(kernels))
    return table


def _kernels_by_op(backend: Backend) -> str:
    from llava_core.backend import reference_kernels

    _, selections = _selections(backend)
    chosen = {(s.kernel.op, s.kernel.name) for s in selections.values()}
    by_op: dict[str, list[str]] = {}
    for kernel in sorted([*backend.kernels(), *reference_kernels()], key=lambda k: (k.op, -k.priority)):
        marked = f"[{kernel.name}]" if (kernel.op, kernel.name) in chosen else kernel.name
        by_op.setdefault(kernel.op, []).append(marked)
    return "\n".join(f"{op}: {' '.join(names)}" for op, names in by_op.items())


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
    from llava_core.train.report import kernel_table

    use, selections = _selections(backend)
    table = kernel_table(selections)
    table.title = f"chosen for LLaVA-1.5 7B, stage 2, {str(use.dtype).removeprefix('torch.')}"
    return table


def _selections(backend: Backend) -> tuple[Use, dict[str, Selection]]:
    """What stage 2 of a LLaVA-1.5 7B would run on, in this backend's default precision."""
    from llava_core.engine.opset import Use, build_ops

    use = Use(backend.precision.default, frozenset({"projector", "language"}), 2048, deterministic=True)
    return use, build_ops(_llava15_7b(), backend, use)[1]


def _llava15_7b() -> ModelSpec:
    from llava_core.model.spec import ModelSpec, TextSpec, VisionSpec

    text = TextSpec("llama", 32000, 4096, 11008, 32, 32, 32, 128, 1e-5, 4096)
    return ModelSpec(text, VisionSpec("clip", 336, 14, 1024, 4096, 24, 16, "quick_gelu", 1e-5))
