"""What the demo shows while something lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def tracker(console: Console, title: str) -> Callable[[Iterable[int]], Iterator[int]]:
    """Passes steps on and draws a bar of them; where the output is not a terminal, says nothing."""

    def track(steps: Iterable[int]) -> Iterator[int]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            yield from progress.track(list(steps), description=title)

    return track
