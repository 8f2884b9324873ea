"""Tasks given to processes that end with this one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, Protocol, TypeVar

from llava_core.errors import DataError, LlavaError
from llava_core.parent import end_with_parent

R = TypeVar("R", covariant=True)
TOLD_SECONDS = 0.2
"""How often a process tells of its rows; each would be a message that both wait for."""


class Task(Protocol, Generic[R]):
    """What is done for each number."""

    def __call__(self, number: int, advance: Callable[[int], None]) -> R:
        """The result. `advance` is told how many rows were done since the last call."""
        ...


class Done(Generic[R]):
    """A task's result, on its way here."""

    def __init__(self, result: R) -> None:
        self.result = result


@contextmanager
def started(
    task: Task[R], numbers: Sequence[int], num_workers: int, advance: Callable[[int], None]
) -> Iterator[Iterator[R]]:
    """The result of each task when it is done, in any order; meanwhile `advance` is told how many more rows were done.

    The processes, if more than one, have started; all are ended on leaving, whatever they are at.

    Raises:
        LlavaError, OSError: what a task raises.
        DataError: a process was killed, e.g. for want of memory.
    """
    if num_workers == 1:
        yield _alone(task, numbers, advance)
        return
    context = multiprocessing.get_context("fork")  # a reader's index is shared, not pickled
    processes: dict[Connection, BaseProcess] = {}
    process: BaseProcess
    try:
        for _ in range(min(num_workers, len(numbers))):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(os.getpid(), task, there), daemon=True)
            process.start()
            there.close()  # else its end would not be seen
            processes[here] = process
        yield _together(numbers, processes, advance)
    finally:
        for process in processes.values():
            process.kill()
        for process in processes.values():
            process.join()


def _alone(task: Task[R], numbers: Sequence[int], advance: Callable[[int], None]) -> Iterator[R]:
    told = Told(advance)
    for number in numbers:
        result = task(number, told.advance)
        told.flush()
        yield result


def _together(
    numbers: Sequence[int], processes: dict[Connection, BaseProcess], advance: Callable[[int], None]
) -> Iterator[Any]:
    waiting, idle = list(reversed(numbers)), list(processes)
    busy: set[Connection] = set()
    while waiting or busy:
        while waiting and idle:
            connection = idle.pop()
            _send(connection, waiting.pop(), processes[connection])
            busy.add(connection)
        for ready in wait(list(busy)):
            assert isinstance(ready, Connection)
            message = _received(ready, processes[ready])
            if isinstance(message, Exception):
                raise message
            if isinstance(message, Done):
                busy.remove(ready)
                idle.append(ready)
                yield message.result
            else:
                advance(message)


def _send(connection: Connection, number: int, process: BaseProcess) -> None:
    try:
        connection.send(number)
    except OSError:
        raise _ended(process) from None


def _received(connection: Connection, process: BaseProcess) -> Any:
    try:
        return connection.recv()
    except (EOFError, OSError):  # the second where it ended before it took what it was sent
        raise _ended(process) from None


def _ended(process: BaseProcess) -> DataError:
    process.join()
    return DataError(
        f"a process that prepared rows ended with {process.exitcode}. What is finished is kept: if memory ran out, "
        "start again with fewer --workers"
    )


def _work(parent: int, task: Task[Any], connection: Connection) -> None:
    """A process: tasks by their number until its parent ends it. A mistake of ours ends it with a traceback."""
    end_with_parent(parent, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all, and the parent ends this one
    told = Told(connection.send)
    while True:
        number = connection.recv()
        try:
            result = task(number, told.advance)
        except (LlavaError, OSError) as error:
            connection.send(error)
            return
        told.flush()
        connection.send(Done(result))


class Told:
    """Rows that were done, told now and then."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self._tell, self._count, self._last = tell, 0, time.monotonic()

    def advance(self, count: int) -> None:
        self._count += count
        if time.monotonic() - self._last > TOLD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Tell what was not told yet."""
        if self._count:
            self._tell(self._count)
        self._count, self._last = 0, time.monotonic()
