"""Saves a run's state while it trains: at once, or in the background, while training goes on."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial

from torch import Tensor

from llava_core.engine.hardware import HOST
from llava_core.engine.processes import Processes, is_about_peers
from llava_core.errors import CheckpointError
from llava_core.train import resume
from llava_core.train.agreement import agree
from llava_core.train.checkpoint import Draft, write_draft
from llava_core.train.prepare import Run


class Saver:
    """At most one save is under way. Every process calls each method after the same step.

    Args:
        background: the run's processes, for the threads that save; None to save at once.
    """

    def __init__(self, run: Run, background: Processes | None) -> None:
        self._run = run
        self._background = background
        self._writing: Writing | None = None

    def save(self, step: int) -> None:
        """Save the state after `step`; in the background, this returns once the state may change.

        Raises:
            CheckpointError: this save failed, or the one before, which was awaited first.
        """
        if self._background is None:
            self.save_now(step)
            return
        self.wait()
        draft = resume.draft(self._run, step)
        copies: dict[str, Tensor] = {}
        backend = self._run.hardware.backend
        agree(self._run.processes, lambda: copies.update(host_copies(draft.own, backend.synchronize)))
        write = partial(write_draft, resume.checkpoint_folder(self._run), processes=self._background)
        self._writing = Writing(replace(draft, own=copies), write)

    def save_now(self, step: int) -> None:
        """Save the state after `step`, and return once it is saved. Raises as `save`."""
        self.wait()
        resume.save(self._run, step)

    def settle(self) -> None:
        """Make an end of a save that every process has done its part of. Raises CheckpointError where it failed."""
        if self._writing is not None and all(self._run.processes.gather(self._writing.has_ended)):
            self.wait()

    def wait(self) -> None:
        """Returns once no save is under way.

        Raises:
            CheckpointError: the one that was under way failed.
            RuntimeError: it lost another process.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.wait()


@contextmanager
def saving(run: Run, timeout: timedelta) -> Iterator[Saver]:
    """Within, the run is saved as its config says. At the end no save is under way, and each has succeeded.

    An error within still lets a save that is under way come to its end; should that fail, too, it is a warning.

    Args:
        timeout: how long a process that saves in the background waits for another, in each exchange.

    Raises:
        CheckpointError: the last save failed.
    """
    checkpoint = run.config.checkpoint
    in_background = checkpoint.asynchronous and checkpoint.every_steps is not None
    saver = Saver(run, run.processes.with_own_channel(timeout) if in_background else None)
    try:
        yield saver
    except Exception as error:
        # Not for a lost process, whose part of the checkpoint may never come.
        if not (isinstance(error, RuntimeError) and is_about_peers(error)):
            wait_beside_error(saver)
        raise
    saver.wait()


def wait_beside_error(saver: Saver) -> None:
    """Wait for a save under way, whose failure shall not hide the error that ends the run."""
    try:
        saver.wait()
    except (CheckpointError, RuntimeError) as failure:
        warnings.warn(f"a save was under way, and failed: {failure}", stacklevel=2)


class Writing:
    """A thread that writes a checkpoint.

    A daemon: a process that ends with an error must not wait for one that is lost. What is cut off so has no name yet.
    """

    def __init__(self, draft: Draft, write: Callable[[Draft], object]) -> None:
        # Held here, too, so that memory that a device's driver knows of is given back by the thread that took it.
        self._draft = draft
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(write,), name=f"save-{draft.step}", daemon=True)
        self._thread.start()

    @property
    def has_ended(self) -> bool:
        """Whether `wait` would return at once, or raise."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Returns when the checkpoint is saved. Raises whatever kept it from that."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self, write: Callable[[Draft], object]) -> None:
        try:
            write(self._draft)
        except Exception as error:
            self._error = error


def host_copies(tensors: Mapping[str, Tensor], synchronize: Callable[[], None]) -> dict[str, Tensor]:
    """Copies of tensors in host memory, which nothing else uses.

    Args:
        synchronize: waits for the device.
    """
    # Asked not to wait, torch copies to page-locked memory where a device has it, and keeps that for the next save.
    copies = {name: tensor.to(HOST, non_blocking=True, copy=True) for name, tensor in tensors.items()}
    synchronize()
    return copies
