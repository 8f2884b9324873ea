"""`llava-core certify`: whether a backend does what the library needs of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llava_core.cli.options import BackendOption

if TYPE_CHECKING:
    from rich.console import Console

    from llava_core.testing.conformance import Certificate, Subject
    from llava_core.testing.conformance.check import Check


def certify(
    backend: BackendOption = None,
    op: Annotated[str | None, typer.Option(help="Only the checks of this op.")] = None,
    case: Annotated[str | None, typer.Option(help="Only the checks on this case of the catalogue.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write every check's outcome into this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page for a browser into this file.")] = None,
) -> None:
    """Check a backend: kernels, masks, refusals, device, collectives and training; exit code 1 if a check fails."""
    from rich.console import Console

    from llava_core.engine.hardware import choose_backend
    from llava_core.plugins import Registry
    from llava_core.testing.conformance import all_checks, build_subject, select_checks
    from llava_core.testing.conformance.page import render_page
    from llava_core.testing.conformance.terminal import print_certificate

    registry, console = Registry.discover(), Console()
    subject = build_subject(choose_backend(backend, registry), registry)
    certificate = _run(subject, select_checks(all_checks(subject), op, case), console)
    print_certificate(certificate, console)
    for path, text in ((json, certificate.to_json()), (html, render_page(certificate))):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    raise typer.Exit(0 if certificate.ok else 1)


def _run(subject: Subject, checks: list[Check], console: Console) -> Certificate:
    from rich.progress import Progress

    from llava_core.testing.conformance import certify as run_checks

    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"certifying {subject.backend.name}", total=len(checks))
        return run_checks(subject, checks, lambda _: progress.advance(task))
