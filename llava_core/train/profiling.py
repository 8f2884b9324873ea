"""Records some steps of a run for a trace viewer."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from llava_core.backend import Backend

PROFILE_FOLDER = "profile"


class StepProfiler:
    """The backend's profiler around the steps `first` to `last`, the wait for data between them included.

    A run that ends or is resumed within them records those that it has.
    """

    def __init__(self, backend: Backend, output: Path, steps: tuple[int, int] | None) -> None:
        self._backend = backend
        self._folder = output / PROFILE_FOLDER
        self._steps = steps
        self._recording: ExitStack | None = None

    def before(self, step: int) -> None:
        """Starts the recording, if this is one of the steps."""
        if self._steps is not None and self._recording is None and self._steps[0] <= step <= self._steps[1]:
            self._recording = ExitStack()
            self._recording.enter_context(self._backend.profiler(self._folder))

    def after(self, step: int) -> None:
        """Writes the trace, if this is the last of the steps."""
        if self._steps is not None and step == self._steps[1]:
            self.close()

    def close(self) -> None:
        """Ends a recording that is under way."""
        if self._recording is not None:
            self._backend.synchronize()
            self._recording.close()
