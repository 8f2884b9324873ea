"""`llava-core doctor`: what is wrong with this environment, and the one thing that mends each."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

import typer

LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "sentencepiece", "pillow", "pydantic", "pluggy")
AUTOLOAD_GROUP = "torch.backends"
"""Entry points that PyTorch imports by itself when it is imported."""

ERROR_LINE = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt)\b")
"""A line of a traceback that names an exception; a chain of causes has several."""

AUTOLOAD_SWITCH = "TORCH_DEVICE_BACKEND_AUTOLOAD"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. Not a backend's `Diagnosis`: that needs a torch that can be imported."""

    subject: str
    ok: bool
    found: str
    fix: str = ""


def doctor() -> None:
    """Diagnose the environment: versions, plugins, devices, threads; exit code 1 if something needs mending."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="doctor", title_justify="left")
    for column in ("", "what", "found", "to mend it"):
        table.add_column(column, overflow="fold")
    all_ok = True
    for finding in examine():
        all_ok &= finding.ok
        table.add_row("ok" if finding.ok else "[red]!![/]", finding.subject, finding.found, finding.fix)
    Console().print(table)
    raise typer.Exit(0 if all_ok else 1)


def examine() -> Iterator[Finding]:
    """Every finding. Nothing that a vendor's library does can end this process: what may break is tried in another."""
    yield Finding("python", sys.version_info >= (3, 10), platform.python_version(), "")
    for library in LIBRARIES:
        yield _version(library)
    imports = _imports("torch")
    yield imports
    if not imports.ok:
        return  # everything below needs torch
    yield _imports("transformers")
    yield from _plugins()


def _version(library: str) -> Finding:
    try:
        return Finding(library, True, metadata.version(library))
    except metadata.PackageNotFoundError:
        return Finding(library, False, "not installed", f"pip install {library}")


def _imports(library: str) -> Finding:
    """Whether a library can be imported, tried in a process of its own."""
    found = _try_import(library)
    if found is None:
        return Finding(f"import {library}", True, "works")
    without_autoload = _try_import(library, {AUTOLOAD_SWITCH: "0"}) is None
    culprits = ", ".join(sorted({_distribution(e) for e in metadata.entry_points(group=AUTOLOAD_GROUP)}))
    if without_autoload:
        fix = (
            f"torch loads {culprits} by itself, and that fails: install what it needs (a device driver and its "
            f"libraries, on the loader's path), uninstall it, or set {AUTOLOAD_SWITCH}=0 to do without it"
        )
    elif culprits:
        fix = f"a device extension is broken: install what {culprits} needs, or uninstall it"
    else:
        fix = f"reinstall {library}"
    return Finding(f"import {library}", False, found, fix)


def _try_import(library: str, environment: dict[str, str] | None = None) -> str | None:
    """None if the import works, else the errors that it ended with, the first cause first."""
    result = subprocess.run(
        [sys.executable, "-c", f"import {library}"],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode == 0:
        return None
    errors = [line for line in result.stderr.splitlines() if ERROR_LINE.match(line)]
    return "; ".join(errors) or f"ended with code {result.returncode}"


def _plugins() -> Iterator[Finding]:
    from llava_core.engine.hardware import load_backend, probe_backend, vendor_code
    from llava_core.errors import PluginError
    from llava_core.plugins import Registry

    registry = Registry.discover()
    for failure in registry.failures:
        yield Finding(f"plugin {failure.plugin}", False, failure.reason, f"update or uninstall {failure.distribution}")
    for name, offer in registry.offers("backend").items():
        try:
            probe = probe_backend(name, registry)
            with vendor_code(name, registry, "diagnostics()"):
                diagnoses = list(load_backend(name, registry).diagnostics())
        except PluginError as error:
            yield Finding(f"backend {name}", False, error.reason, f"update or uninstall {offer.distribution}")
            continue
        yield Finding(f"backend {name}", True, f"{'available' if probe.available else 'not available'}: {probe.reason}")
        for diagnosis in diagnoses:
            yield Finding(diagnosis.subject, diagnosis.ok, diagnosis.found, diagnosis.fix)


def _distribution(entry_point: metadata.EntryPoint) -> str:
    return entry_point.dist.name if entry_point.dist is not None else entry_point.value
