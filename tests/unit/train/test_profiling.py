"""The steps that are recorded for a trace viewer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from llava_core.train.profiling import StepProfiler
from llava_cpu.backend import CpuBackend


class Noting(CpuBackend):
    """Notes when its profiler starts and ends."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def profiler(self, folder: Path) -> AbstractContextManager[object]:
        @contextmanager
        def noted() -> Iterator[None]:
            self.events.append(f"start {folder.name}")
            yield
            self.events.append("end")

        return noted()


def run(backend: Noting, steps: tuple[int, int] | None, first: int, last: int) -> list[str]:
    profiler = StepProfiler(backend, Path("out"), steps)
    for step in range(first, last + 1):
        profiler.before(step)
        backend.events.append(str(step))
        profiler.after(step)
    profiler.close()
    return backend.events


@pytest.mark.parametrize(
    ("steps", "first", "last", "events"),
    [
        ((2, 3), 1, 4, ["1", "start profile", "2", "3", "end", "4"]),
        ((2, 2), 1, 3, ["1", "start profile", "2", "end", "3"]),
        ((2, 4), 3, 5, ["start profile", "3", "4", "end", "5"]),  # resumed within
        ((2, 4), 1, 3, ["1", "start profile", "2", "3", "end"]),  # interrupted within
        ((2, 3), 4, 5, ["4", "5"]),  # resumed after
        (None, 1, 2, ["1", "2"]),
    ],
)
def test_the_named_steps_are_recorded_once(
    steps: tuple[int, int] | None, first: int, last: int, events: list[str]
) -> None:
    assert run(Noting(), steps, first, last) == events
