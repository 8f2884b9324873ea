"""The processes of a run, and how their hosts agree on what no device needs to know."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TypeVar

from torch import distributed
from torch.distributed.rendezvous import rendezvous

from llava_core.engine.hardware import HOST, Hardware
from llava_core.errors import ConfigError, TrainingError

T = TypeVar("T")

VARIABLES = {"rank": "RANK", "size": "WORLD_SIZE", "local_rank": "LOCAL_RANK", "local_size": "LOCAL_WORLD_SIZE"}
"""What torchrun tells each process it starts."""

HOST_GROUP = "gloo"
"""The process group in which hosts exchange objects, beside the device's own."""


ROLL_SECONDS = 3.0
"""They lose the same process at the same time, save for the work between two exchanges."""


LETTING_GO_SECONDS = 0.2
"""gloo's threads hand over the result of an exchange before they drop its tensors, for which they need the interpreter.
One that asks for it while it shuts down aborts the process (pytorch/pytorch#190489): on a busy machine, 8 of 60 times
with threads of the lowest priority; with half of this rest, none of 100."""


ALL_LEAVE, LOST = "all-leave", "lost"
"""Keys that say that every process is done, and that one has lost others."""


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    Attributes:
        rank, size: among all.
        local_rank, local_size: among those of this machine.
        channel: in which their hosts exchange objects; None for that of the whole run.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    channel: distributed.ProcessGroup | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Processes:
        """What a launcher told this process; one process alone where there was none.

        Raises:
            ConfigError: it told only a part, or no numbers.
        """
        told = {field: environment[name] for field, name in VARIABLES.items() if name in environment}
        if not told:
            return cls()
        if len(told) < len(VARIABLES) or not all(value.isdecimal() for value in told.values()):
            found = ", ".join(f"{name}={environment.get(name)!r}" for name in VARIABLES.values())
            raise ConfigError(f"{found}: a launcher sets all four to numbers; start with `llava-core train --nproc N`.")
        rank, size, local_rank, local_size = (int(told[field]) for field in VARIABLES)
        return cls(rank, size, local_rank, local_size)

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes files and prints."""
        return self.rank == 0

    @contextmanager
    def joined(self, hardware: Hardware, timeout: timedelta, *, group_of_one: bool = False) -> Iterator[None]:
        """Within, every process can talk to every other: devices by the backend's group, hosts by gloo.

        Args:
            timeout: how long one may wait for another, in each exchange.
            group_of_one: make a group also where there is no other process, for what is built on one.

        Raises:
            TrainingError: others are gone or did not answer in time; it names them and their hosts.
        """
        if self.size == 1 and not group_of_one:
            yield
            return
        store = distributed.HashStore() if self.size == 1 else _meeting_place(self, timeout)
        roll = RollCall(self, store)
        device_type, group = hardware.device.type, hardware.backend.dist.process_group
        groups = f"{HOST}:{HOST_GROUP}" if device_type == HOST else f"{HOST}:{HOST_GROUP},{device_type}:{group}"
        # An error leaves the group as it is: taking it down would tell the others that this process is lost before it
        # can say why, and waits for those that are lost. The process ends with the error, and the group with it.
        try:
            distributed.init_process_group(groups, store=store, timeout=timeout, rank=self.rank, world_size=self.size)
            yield
            roll.leave_together(timeout)
        except RuntimeError as error:
            if not is_about_peers(error):
                raise
            raise roll.missing(error) from error
        finally:
            time.sleep(LETTING_GO_SECONDS)
        distributed.destroy_process_group()

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank. Small host objects; each process must call it as often as the others."""
        if self.size == 1:
            return [value]
        found: list[T] = [value] * self.size
        distributed.all_gather_object(found, value, group=self.channel)
        return found

    def with_own_channel(self, timeout: timedelta) -> Processes:
        """The same processes, for another thread: what it gathers does not mix with what the others do meanwhile.

        All of them call this together, once joined.

        Args:
            timeout: how long one may wait for another, in each exchange.
        """
        if self.size == 1:
            return self
        return replace(self, channel=distributed.new_group(backend=HOST_GROUP, timeout=timeout))


def _meeting_place(processes: Processes, timeout: timedelta) -> distributed.Store:
    try:
        store, _, _ = next(rendezvous("env://", processes.rank, processes.size, timeout=timeout))
    except distributed.DistError as error:
        raise TrainingError(
            f"the processes cannot meet at MASTER_ADDR and MASTER_PORT: {_first_line(error)}. Is the port taken, or "
            "one of them missing?"
        ) from error
    return store


class RollCall:
    """Who is still there after an exchange failed. Those that wait see it at about the same time, and sign."""

    def __init__(self, processes: Processes, store: distributed.Store) -> None:
        self._processes = processes
        self._store = distributed.PrefixStore("roll", store)
        self._store.set(f"host/{processes.rank}", socket.gethostname())

    def leave_together(self, timeout: timedelta) -> None:
        """Waits until every process is done: who leaves first cuts off those that still read its last message."""
        end = time.monotonic() + timeout.total_seconds()
        try:
            if self._store.add("leaving", 1) == self._processes.size:
                self._store.set(ALL_LEAVE, "1")
            while not (self._store.check([ALL_LEAVE]) or self._store.check([LOST])) and time.monotonic() < end:
                time.sleep(0.02)
        except distributed.DistError:
            return  # whoever holds the store has left, which it does when all are done

    def missing(self, error: RuntimeError) -> TrainingError:
        """The error that names whoever does not sign within ROLL_SECONDS."""
        try:
            absent = self._await_others()
        except distributed.DistError:
            return TrainingError(f"lost the other processes, and the place where they meet: {_first_line(error)}")
        if not absent:
            return TrainingError(f"all processes answer, but an exchange between them failed: {_first_line(error)}")
        return TrainingError(
            f"no answer from {', '.join(absent)}: it ended, is stopped or hangs, or its machine or network is down "
            f"({_first_line(error)})"
        )

    def _await_others(self) -> list[str]:
        self._store.set(LOST, "1")
        self._store.set(f"here/{self._processes.rank}", "1")
        end = time.monotonic() + ROLL_SECONDS
        absent = [rank for rank in range(self._processes.size) if rank != self._processes.rank]
        while absent and time.monotonic() < end:
            absent = [rank for rank in absent if not self._store.check([f"here/{rank}"])]
            time.sleep(0.05)
        return [f"rank {rank} on {self._host(rank)}" for rank in absent]

    def _host(self, rank: int) -> str:
        key = f"host/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else "a host that never joined"


def is_about_peers(error: RuntimeError) -> bool:
    """Whether it says that an exchange failed, not this process's own work. gloo has no exception of its own, but
    names its source file."""
    return isinstance(error, distributed.DistError) or f"/{HOST_GROUP}/" in str(error)


def _first_line(error: RuntimeError) -> str:
    return str(error).partition("\n")[0]
