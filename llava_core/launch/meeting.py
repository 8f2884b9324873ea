"""The launchers of a run, one a machine: they meet in a store, tell each other of a failure, and leave together."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta

from torch import distributed

from llava_core.errors import ConfigError, TrainingError
from llava_core.launch.plan import Plan
from llava_core.launch.ranks import Failure

START_SECONDS = 900
"""How long machines wait for each other: a scheduler may start them minutes apart."""

BEAT_SECONDS = 1
LOST_SECONDS = 60
"""Without a beat for so long a machine counts as lost; one that swaps or whose clock jumps is not."""

CONNECT_SECONDS = 30
"""For one answer of a store that was reached: past it, its machine is lost."""

END = "end"
"""The key under which the first machine to know says that all must end."""

LEAVE_SECONDS = 5
"""How long the store stays after a failure for machines that read the last words in it. Where all went well, a machine
may take as long as one that is not lost."""


@dataclass(frozen=True)
class Outcome:
    """How processes ended: the exit codes of all, and what is known of those that failed."""

    codes: Sequence[int]
    failures: Sequence[Failure]


@dataclass(frozen=True)
class End:
    """Why processes are ended before their time, where it is not that one failed, and the exit code that says so."""

    reason: str = ""
    code: int = 1


class Meeting:
    """This machine's launcher among all. With one machine it holds the store for its processes, and nothing else."""

    def __init__(self, plan: Plan, say: Callable[[str], None], start_seconds: float = START_SECONDS) -> None:
        """
        Raises:
            ConfigError: the meeting place cannot be opened, or the machines were started with different numbers.
            TrainingError: not all came in time.
        """
        self._start_end = time.monotonic() + start_seconds
        self._end: End | None = None
        if plan.node_rank > 0:
            self._await_place(plan, say)
        self._served = self._open_store(plan)
        self.plan = replace(plan, master_port=self._served.port)
        self._store = distributed.PrefixStore("launchers", self._served)
        self._beats = 0
        self._last_beat = 0.0
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._others = [node for node in range(plan.nnodes) if node != plan.node_rank]
        if self._others:
            try:
                self._gather(say)
            except distributed.DistError as error:
                raise TrainingError(
                    f"node 0 left while the machines met; its own message says why ({error})."
                ) from error

    @property
    def ended(self) -> End | None:
        """Why all processes are to end, here or on another machine; to be asked again and again, for it beats too."""
        if self._end is None and self._others:
            try:
                self._beat()
                if self._store.check([END]):
                    self._end = End(**json.loads(self._store.get(END)))
            except distributed.DistError:
                self._end = End(f"the launcher of node 0, at {self.plan.master_addr}, is gone", 1)
        return self._end

    def tell_end(self, end: End) -> None:
        """Have every machine end its processes. Who tells first is believed."""
        if self.ended is not None:
            return
        self._end = end
        if self._others:
            try:
                self._end = End(**json.loads(self._store.compare_set(END, "", json.dumps(asdict(end)))))
            except distributed.DistError:
                self._end = replace(
                    end, reason=f"{end.reason or 'a process failed'}; node 0 was not told, for it is gone"
                )

    def leave(self, outcome: Outcome, patience: float, must_end: Callable[[], bool]) -> Outcome:
        """Waits for every machine to end; the outcomes of all of them together.

        Args:
            patience: seconds to wait for the others once there is a failure; before, they may take their time.
        """
        if not self._others:
            return outcome
        codes, failures, end = [*outcome.codes], [*outcome.failures], float("inf")
        try:
            self._store.set(f"outcome/{self.plan.node_rank}", json.dumps(asdict(outcome)))
            missing = list(self._others)
            while missing and time.monotonic() < end and not must_end():
                for other in [n for n in missing if self._store.check([f"outcome/{n}"])]:
                    found = json.loads(self._store.get(f"outcome/{other}"))
                    codes += found["codes"]
                    failures += [Failure(**failure) for failure in found["failures"]]
                    missing.remove(other)
                missing = [other for other in missing if other in self._others]
                if end == float("inf") and self.ended is not None:
                    end = time.monotonic() + patience
                time.sleep(0.05)
            self._store.set(f"left/{self.plan.node_rank}", "1")
            if self.plan.node_rank == 0:
                well = not (missing or failures or self._end)
                if well:
                    self._wait_to_leave(LOST_SECONDS, must_end)
                else:
                    self._wait_to_leave(LEAVE_SECONDS, lambda: False)  # those who asked for an end wait for this
        except distributed.DistError:
            if self.plan.node_rank == 0 or not failures:
                self._end = self._end or End(f"the launcher of node 0, at {self.plan.master_addr}, is gone", 1)
        self._others = []  # node 0 may leave now, and that its store is gone says nothing
        return Outcome(codes, failures)

    def _await_place(self, plan: Plan, say: Callable[[str], None]) -> None:
        """Waits for node 0. Not by the store's own client: that waits deaf to signals, and fills the screen."""
        told = False
        while True:
            try:
                socket.create_connection((plan.master_addr, plan.master_port), timeout=1).close()
                return
            except OSError as error:
                if time.monotonic() > self._start_end:
                    raise TrainingError(f"node 0 was not reached at {_place(plan)}: {error}.") from error
                if not told:
                    say(f"waiting for node 0 at {_place(plan)} ({error})")
                told = True
            time.sleep(0.2)

    def _open_store(self, plan: Plan) -> distributed.TCPStore:
        try:
            return distributed.TCPStore(
                plan.master_addr,
                plan.master_port,
                is_master=plan.node_rank == 0,
                timeout=timedelta(seconds=CONNECT_SECONDS),
                wait_for_workers=False,
            )
        except distributed.DistError as error:
            reason = str(error).partition("\n")[0]
            raise ConfigError(f"the processes cannot meet at {_place(plan)}: {reason}. Try another port.") from error

    def _gather(self, say: Callable[[str], None]) -> None:
        """Waits until every machine is here, and compares what they were started with."""
        plan = self.plan
        if self._store.add(f"present/{plan.node_rank}", 1) > 1:
            raise ConfigError(f"--node-rank {plan.node_rank} was given to two machines.")
        mine = json.dumps([plan.nproc, plan.nnodes])
        self._store.set(f"node/{plan.node_rank}", mine)
        missing, told = list(self._others), False
        while missing:
            missing = [node for node in missing if not self._store.check([f"node/{node}"])]
            if missing and time.monotonic() > self._start_end:
                raise TrainingError(f"of {plan.nnodes} machines, node {', '.join(map(str, missing))} did not come.")
            if missing and not told:
                say(f"waiting for node {', '.join(map(str, missing))}")
                told = True
            time.sleep(0.05)
        for node in self._others:
            theirs = self._store.get(f"node/{node}").decode()
            if theirs != mine:
                raise ConfigError(
                    f"node {plan.node_rank} was started with [--nproc, --nnodes] {mine} and node {node} with {theirs}: "
                    "each machine must have the same."
                )

    def _beat(self) -> None:
        """Tells the others that this machine is alive; node 0, whose end closes the store, listens to all others."""
        now = time.monotonic()
        if now - self._last_beat < BEAT_SECONDS:
            return
        self._last_beat = now
        self._beats += 1
        self._store.set(f"beat/{self.plan.node_rank}", str(self._beats))
        if self.plan.node_rank > 0:
            return
        for node in self._others:
            if self._store.check([f"left/{node}"]):
                continue
            beat = self._store.get(f"beat/{node}") if self._store.check([f"beat/{node}"]) else b""
            known, since = self._heard.get(node, (None, now))
            self._heard[node] = (beat, now if beat != known else since)
            if now - since > LOST_SECONDS and beat == known:
                self.tell_end(End(f"the launcher of node {node} has not been heard of for {LOST_SECONDS} s", 1))
                self._others = [other for other in self._others if other != node]  # nobody waits for it any more

    def _wait_to_leave(self, seconds: float, must_end: Callable[[], bool]) -> None:
        end = time.monotonic() + seconds
        while any(not self._store.check([f"left/{node}"]) for node in self._others):
            if time.monotonic() > end or must_end():
                return
            time.sleep(0.05)


def _place(plan: Plan) -> str:
    return f"{plan.master_addr}:{plan.master_port}"
