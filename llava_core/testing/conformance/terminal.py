"""A certificate on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llava_core.testing.conformance.result import Certificate, Result, Status
from llava_core.testing.conformance.summary import heading, skips, summarise, verdict

COLOURS = {Status.PASSED: "green", Status.FAILED: "bold red", Status.SKIPPED: "yellow"}
MAX_SHOWN = 40
"""Failures printed in full, the first of each check and kernel: one defect can fail hundreds."""


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
    shown = first_of_each(failures)[:MAX_SHOWN]
    for failure in shown:
        _print_failure(failure, console)
    if len(failures) > len(shown):
        console.print(
            f"… and {len(failures) - len(shown)} more like these; --json FILE and --html FILE list all of them"
        )
    style = COLOURS[Status.PASSED if certificate.ok else Status.FAILED]
    console.print(verdict(certificate), style=style, markup=False)


def first_of_each(failures: Sequence[Result]) -> list[Result]:
    """One failure of each check and kernel, in the order they ran."""
    firsts: dict[tuple[str, ...], Result] = {}
    for failure in failures:
        firsts.setdefault((failure.name, *failure.target.split("/")[:2]), failure)
    return list(firsts.values())


def _print_failure(failure: Result, console: Console) -> None:
    console.print(failure.id, style=COLOURS[Status.FAILED], markup=False, highlight=False, soft_wrap=True)
    console.print(f"  {failure.message}", markup=False, highlight=False, soft_wrap=True)
