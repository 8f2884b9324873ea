"""Plain facts that a backend states about its hardware. No behaviour, no vendor library."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class DeviceInfo:
    """One device. `memory_bytes` is its total memory, None where it cannot be known without opening it."""

    index: int
    name: str
    memory_bytes: int | None


@dataclass(frozen=True)
class Probe:
    """Whether a backend can run here, and why not."""

    available: bool
    reason: str
    devices: tuple[DeviceInfo, ...] = ()


@dataclass(frozen=True)
class PrecisionCaps:
    """What the hardware computes in.

    Attributes:
        compute: dtypes in which the model can run.
        default: the one a run takes when the config says `auto`.
        reason: why that is the default.
    """

    compute: frozenset[torch.dtype]
    default: torch.dtype
    reason: str


@dataclass(frozen=True)
class DistSpec:
    """How devices of this kind talk: the torch process group and the dtypes it can sum."""

    process_group: str
    reduce_dtypes: frozenset[torch.dtype]


@dataclass(frozen=True)
class World:
    """The processes of a run: `local_size` on this machine, one for each device, on `num_nodes` machines."""

    local_size: int
    num_nodes: int = 1


@dataclass(frozen=True)
class ConfigProblem:
    """A setting that this backend cannot honour."""

    key: str
    found: str
    expected: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.key} = {self.found}: expected {self.expected}; {self.remedy}"


@dataclass(frozen=True)
class Diagnosis:
    """One line of `llava-core doctor`: what was looked at, what was found, and the one thing that mends it."""

    subject: str
    ok: bool
    found: str
    fix: str = field(default="")
