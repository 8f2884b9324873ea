"""What a check of the data tells the person who started it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from llava_core.data.tokens import render_supervised
from llava_core.preflight.check import Checked
from llava_core.preflight.foresight import MOST_EPOCHS
from llava_core.preflight.subject import Subject

LINES = 10
"""How many lines tell of the progress where there is no terminal to draw a bar on."""

Cell = Callable[[dict[str, Any]], str]


def print_checked(checked: Checked, subject: Subject, console: Console) -> None:
    """The first samples, the tables, where the files are, and the problems."""
    for example, source in zip(checked.examples, checked.report["sources"], strict=True):
        if example is not None:
            text = render_supervised(
                subject.tokenizer, example.tokens, example.supervised, example.image_starts, example.visual_tokens
            )
            name = f" of {Path(source['path']).name}" if len(checked.examples) > 1 else ""
            title = Text(f"first sample{name}, {example.id}; ⟦supervised⟧")
            console.print(Panel(text, title=title, title_align="left"))
    max_length, validated_on = subject.config.data.max_length, checked.report["validation"]
    console.print(_data_table(checked.report, "data", max_length))
    console.print(_epoch_table(checked.report))
    if validated_on is not None:
        console.print(_data_table(validated_on, "validation", max_length))
    listed = ", with a list of the bad rows" if checked.num_bad else ""
    console.print(f"written to {checked.folder}{listed}", markup=False, soft_wrap=True)
    if not checked.report["run"]["whole"]:
        console.print(f"whether its bad rows stop a run was looked at for its first {MOST_EPOCHS} epochs")
    for problem in checked.problems:
        console.print(f"problem: {problem}", style="red", markup=False, soft_wrap=True)


def _data_table(report: dict[str, Any], title: str, max_length: int) -> Table:
    """A column for each source where there are several, and one for all."""
    sources = report["sources"]
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    if len(sources) > 1:
        for source in sources:
            table.add_column(Text(Path(source["path"]).name), justify="right", overflow="fold")
    table.add_column("all", justify="right", overflow="fold")
    columns = [*sources, report] if len(sources) > 1 else [report]
    for label, cell in _cells(report, max_length):
        table.add_row(label, *(Text(cell(column)) for column in columns))
    return table


def _cells(report: dict[str, Any], max_length: int) -> Iterator[tuple[str, Cell]]:
    """What each line tells of a data set."""
    yield "rows", lambda d: f"{d['rows']['total']:,}"
    yield "bad rows", lambda d: _share(d["rows"]["bad"], d["rows"]["total"])
    for reason in report["rows"]["reasons"]:
        yield f"  {reason}", lambda d, reason=reason: f"{d['rows']['reasons'].get(reason, 0):,}"  # type: ignore[misc]
    yield "ids that several rows have", lambda d: f"{d['rows']['repeated_ids']:,}"
    yield "samples", lambda d: f"{d['samples']['total']:,}"
    yield "tokens", lambda d: f"{d['tokens']['total']:,}"
    yield "  of images", lambda d: _share(d["tokens"]["image"], d["tokens"]["total"])
    yield "  supervised", lambda d: _share(d["tokens"]["label"], d["tokens"]["total"])
    yield "median length", lambda d: _of(d["lengths"], "p50")
    yield "  of 95 % at most", lambda d: _of(d["lengths"], "p95")
    yield "  of 99 % at most", lambda d: _of(d["lengths"], "p99")
    yield "  longest", lambda d: _of(d["lengths"], "max")
    yield (
        f"longer than {max_length:,}",
        lambda d: _share(d["overlong"]["sequences"], (d["lengths"] or {}).get("count", 0)),
    )
    yield "  data.overlong", lambda d: ", ".join(d["overlong"]["become"])
    yield "  rows dropped for it", lambda d: f"{d['overlong']['rows_dropped']:,}"
    yield "images", lambda d: f"{d['images']['usable'] + d['images']['bad']:,}"
    for reason in report["images"]["reasons"]:
        yield f"  {reason}", lambda d, reason=reason: f"{d['images']['reasons'].get(reason, 0):,}"  # type: ignore[misc]
    yield "  median width, height", lambda d: _size(d["images"], "p50")
    yield "  largest width, height", lambda d: _size(d["images"], "max")
    yield "  modes", lambda d: _counted(d["images"]["modes"])
    yield "  formats", lambda d: _counted(d["images"]["formats"])


def _epoch_table(report: dict[str, Any]) -> Table:
    epoch, settings = report["epoch"], report["settings"]
    table = Table(title="first epoch", title_justify="left", show_header=False)
    size = f"{settings['global_size']:,}"
    shares = epoch["data_parallel"]
    on = f", on {shares:,} data-parallel processes" if shares > 1 else ""
    table.add_row("steps", f"{epoch['steps']:,} of {size} rows{on}")
    kind = (
        f"packed to at most {settings['micro_tokens']:,} tokens"
        if settings["micro_tokens"] is not None
        else f"padded, of {settings['micro_size']:,} samples"
    )
    table.add_row("micro-batches", f"{epoch['micro_batches']:,}, {kind}")
    if epoch["real_share"] is not None:
        table.add_row("real tokens of those computed", f"{epoch['real_share']:.1%}")
        table.add_row("micro-batches are full to", f"{epoch['filled_share']:.1%}")
    return table


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.2%})" if part and whole else f"{part:,}"


def _of(distribution: dict[str, float] | None, key: str) -> str:
    return "–" if distribution is None else f"{distribution[key]:,}"


def _size(images: dict[str, Any], key: str) -> str:
    return f"{_of(images['width'], key)}, {_of(images['height'], key)}" if images["width"] else "–"


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items()) or "–"


class RowProgress:
    """Called after each row: it moves a bar or, where the output is no terminal, prints a line now and then.

    Attributes:
        done: how many rows were.
    """

    def __init__(self, console: Console, progress: Progress, total: int) -> None:
        self.done = 0
        self._console, self._progress, self._total = console, progress, total
        self._task = progress.add_task("rows", total=total)

    def __call__(self) -> None:
        self.done += 1
        self._progress.update(self._task, completed=self.done)
        if not self._console.is_terminal and self._lines(self.done) > self._lines(self.done - 1):
            self._console.print(f"{self.done:,} of {self._total:,} rows")

    def _lines(self, done: int) -> int:
        return done * LINES // self._total


@contextmanager
def progress_of_rows(console: Console, total: int) -> Iterator[RowProgress]:
    """What to call after each of so many rows."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield RowProgress(console, progress, total)
