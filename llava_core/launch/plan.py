"""How many processes a run has, and where: from flags, and from the variables that launch scripts set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llava_core.errors import ConfigError

AUTO = "auto"
DEFAULT_PORT = 29500
"""torchrun's, so that a firewall that lets one through lets the other through."""

LAUNCHED = "LOCAL_RANK"
"""Set for each process by a launcher and by no platform: who has it is one of a run's processes."""

HERE = ("NPROC_PER_NODE", "GPUS_PER_NODE")
"""Names under which launch scripts say how many processes a machine has."""


@dataclass(frozen=True)
class Flags:
    """What the command line says; None where it says nothing."""

    nproc: str | None = None
    nnodes: int | None = None
    node_rank: int | None = None
    master_addr: str | None = None
    master_port: int | None = None

    def given(self) -> dict[str, object]:
        """Each flag by its name on the command line."""
        return {f"--{name.replace('_', '-')}": value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Plan:
    """The processes to start: `nproc` on this machine, which is `node_rank` of `nnodes`.

    Attributes:
        master_addr, master_port: where the machines meet; port 0 stands for any free one, of a machine alone.
    """

    nproc: int = 1
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 0

    @property
    def size(self) -> int:
        """Processes on all machines."""
        return self.nproc * self.nnodes


@dataclass(frozen=True)
class Told:
    """A number and who said so."""

    value: int
    by: str


def plan_start(flags: Flags, environment: Mapping[str, str], num_devices: Callable[[], int]) -> Plan:
    """What to start. A flag wins over a variable.

    Args:
        num_devices: how many devices this machine has; asked only for `auto`.

    Raises:
        ConfigError: what is asked for contradicts itself, or is not all there.
    """
    nproc = _told_nproc(flags, environment, num_devices)
    nnodes = _told_nnodes(flags, environment)
    total = None if "RANK" in environment else _variable(environment, "WORLD_SIZE", least=1)
    nproc, nnodes = _agree(nproc, nnodes, total)
    rank = _told_node_rank(flags, environment)
    if nnodes is None:
        _refuse_without_nodes(flags)
    num_nodes = nnodes.value if nnodes else 1
    if rank is None and num_nodes > 1:
        raise ConfigError(f"{_said(nnodes)}, and not which this one is: give --node-rank, or set NODE_RANK.")
    if rank is not None and not 0 <= rank.value < num_nodes:
        told = _said(nnodes) if nnodes else "there is one machine, for no --nnodes is given"
        raise ConfigError(f"{_said(rank)}, but {told}: expected 0 to {num_nodes - 1}.")
    address, port = _meeting_place(flags, environment, num_nodes)
    return Plan(nproc.value if nproc else 1, num_nodes, rank.value if rank else 0, address, port)


def check_flags(flags: Flags, environment: Mapping[str, str]) -> None:
    """Flags beside what a launcher told this process.

    Raises:
        ConfigError: they ask for something else than what was started.
    """
    for flag, value in flags.given().items():
        name = {"--nproc": "LOCAL_WORLD_SIZE", "--nnodes": "GROUP_WORLD_SIZE", "--node-rank": "GROUP_RANK"}.get(flag)
        name = name or flag.removeprefix("--").replace("-", "_").upper()
        if value != AUTO and str(value) != environment.get(name):
            raise ConfigError(
                f"{flag} {value}, but this is one of the processes that a launcher started already, with "
                f"{name}={environment.get(name)}: leave the flag out."
            )


def _told_nproc(flags: Flags, environment: Mapping[str, str], num_devices: Callable[[], int]) -> Told | None:
    if flags.nproc == AUTO:
        return Told(num_devices(), f"--nproc {AUTO}")
    if flags.nproc is not None:
        if not flags.nproc.isdecimal() or int(flags.nproc) < 1:
            raise ConfigError(f"--nproc {flags.nproc}: expected the number of processes, or `{AUTO}`: one per device.")
        return Told(int(flags.nproc), f"--nproc {flags.nproc}")
    told = [_variable(environment, name, least=1) for name in HERE]
    return _same(*told)


def _told_nnodes(flags: Flags, environment: Mapping[str, str]) -> Told | None:
    if flags.nnodes is not None:
        return _positive(Told(flags.nnodes, f"--nnodes {flags.nnodes}"), 1)
    told = _variable(environment, "NNODES", least=1)
    if "RANK" not in environment:
        return told
    # A platform that starts one job a machine counts machines in these; only a launcher sets LOCAL_RANK beside them.
    return told or _variable(environment, "WORLD_SIZE", least=1)


def _told_node_rank(flags: Flags, environment: Mapping[str, str]) -> Told | None:
    if flags.node_rank is not None:
        return Told(flags.node_rank, f"--node-rank {flags.node_rank}")
    return _same(*(_variable(environment, name, least=0) for name in ("NODE_RANK", "RANK")))


def _agree(nproc: Told | None, nnodes: Told | None, total: Told | None) -> tuple[Told | None, Told | None]:
    """WORLD_SIZE as processes in all gives what is missing of the other two, or must be their product."""
    by_flags = all(told is not None and told.by.startswith("--") for told in (nproc, nnodes))
    if total is None or total.value == 1 or by_flags:
        return nproc, nnodes
    if nproc is None and nnodes is None:
        raise ConfigError(f"{total.by} says how many processes there are in all, and not how many here: give --nproc.")
    known = nproc or nnodes
    assert known is not None
    if nproc is not None and nnodes is not None:
        fits = nproc.value * nnodes.value == total.value
    else:
        fits = total.value % known.value == 0
    if not fits:
        told = " and ".join(t.by for t in (nproc, nnodes) if t is not None)
        raise ConfigError(f"{total.by} contradicts {told}: unset one, or give both --nproc and --nnodes.")
    rest = Told(total.value // known.value, total.by)
    return nproc or rest, nnodes or rest


def _meeting_place(flags: Flags, environment: Mapping[str, str], nnodes: int) -> tuple[str, int]:
    """Where the machines meet. One machine needs no place, and takes that of the flags alone: a variable left over
    from another run would make two runs on one machine meet."""
    alone = nnodes == 1
    address = flags.master_addr or (None if alone else environment.get("MASTER_ADDR"))
    port = Told(flags.master_port, f"--master-port {flags.master_port}") if flags.master_port is not None else None
    if port is None and not alone:
        port = _variable(environment, "MASTER_PORT", least=1)
    if port is not None and not 1 <= port.value <= 65535:
        raise ConfigError(f"{port.by}: expected a port, 1 to 65535.")
    if alone:
        return address or Plan.master_addr, port.value if port else Plan.master_port
    if not address:
        raise ConfigError(f"{nnodes} machines, and no place where they meet: give --master-addr, or set MASTER_ADDR.")
    return address, port.value if port else DEFAULT_PORT


def _refuse_without_nodes(flags: Flags) -> None:
    lone = [flag for flag in flags.given() if flag not in ("--nproc", "--nnodes")]
    if lone:
        raise ConfigError(f"{', '.join(lone)} without --nnodes: say of how many machines this is one.")


def _variable(environment: Mapping[str, str], name: str, *, least: int) -> Told | None:
    text = environment.get(name, "")
    if not text:
        return None
    if not text.isdecimal():
        raise ConfigError(f"{name}={text}: expected a number.")
    return _positive(Told(int(text), f"{name}={text}"), least)


def _positive(told: Told, least: int) -> Told:
    if told.value < least:
        raise ConfigError(f"{told.by}: expected {least} or more.")
    return told


def _same(first: Told | None, second: Told | None) -> Told | None:
    if first and second and first.value != second.value:
        raise ConfigError(f"{first.by} contradicts {second.by}: unset one.")
    return first or second


def _said(told: Told | None) -> str:
    assert told is not None
    return f"{told.by} says {told.value}" if not told.by.endswith(str(told.value)) else told.by
