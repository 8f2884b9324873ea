"""A certificate on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llava_core.testing.conformance.result import Certificate, Result, Status
from llava_core.testing.conformance.summary import heading, skips, summarise, verdict

COLOURS = {Status.PASSED: "green", Status.FAILED: "bold red", Status.SKIPPED: "yellow"}
MAX_SHOWN = 40
"""Failures printed in full; one defect can fail hundreds of checks, and the files have all of them."""


def print_certificate(certificate: Certificate, console: Console) -> None:
    """A row a check's name, then the reasons for skips, every failure, and the verdict."""
    table = Table(title=escape(heading(certificate)), title_justify="left")
    for column in ("check", "", "passed", "failed", "skipped", "a pass means"):
        table.add_column(column, overflow="fold")
    for line in summarise(certificate):
        counts = [str(line.counts[status] or "") for status in Status]
        word = f"[{COLOURS[line.status]}]{line.status.value}[/]"
        found = f"\n[dim]{escape(line.found)}[/]" if line.found else ""
        table.add_row(line.name, word, *counts, escape(line.explanation) + found)
    console.print(table)
    for subjects, reason in skips(certificate):
        console.print(f"{subjects}: {reason}", style=COLOURS[Status.SKIPPED], markup=False, highlight=False)
    failures = certificate.failures()
    for failure in failures[:MAX_SHOWN]:
        _print_failure(failure, console)
    if len(failures) > MAX_SHOWN:
        console.print(f"… and {len(failures) - MAX_SHOWN} more; --json FILE and --html FILE list all of them")
    style = COLOURS[Status.PASSED if certificate.ok else Status.FAILED]
    console.print(verdict(certificate), style=style, markup=False)


def _print_failure(failure: Result, console: Console) -> None:
    console.print(failure.id, style=COLOURS[Status.FAILED], markup=False, highlight=False, soft_wrap=True)
    console.print(f"  {failure.message}", markup=False, highlight=False, soft_wrap=True)
