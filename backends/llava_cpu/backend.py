"""The CPU backend: the default, so that everything runs on a laptop."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llava_core.backend import (
    Backend,
    DeviceInfo,
    Diagnosis,
    DistSpec,
    KernelSpec,
    Memory,
    PrecisionCaps,
    Probe,
    Rng,
    World,
)
from llava_core.backend.host import available_cores
from llava_cpu.kernels import KERNELS

THREADS = "OMP_NUM_THREADS"
"""How many threads a user, or a launcher of several processes, allows each of them."""


class CpuMemory(Memory):
    """Resident memory of this process, from Linux's /proc (0 where the system has none)."""

    def peak_bytes(self) -> int:
        return _proc_kilobytes("/proc/self/status", "VmHWM:") * 1024

    def reset_peak(self) -> None:
        if Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set size

    def total_bytes(self) -> int:
        return _proc_kilobytes("/proc/meminfo", "MemTotal:") * 1024


class CpuRng(Rng):
    """PyTorch's host generator."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def state(self) -> Mapping[str, torch.Tensor]:
        return {"host": torch.get_rng_state()}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        torch.set_rng_state(state["host"])


class CpuBackend(Backend):
    """Any CPU: SDPA, plain matmul attention for short bf16 sequences, bf16 where the CPU multiplies it in hardware."""

    name = "cpu"
    device_type = "cpu"

    def __init__(self) -> None:
        self.memory = CpuMemory()
        self.rng = CpuRng()

    @classmethod
    def probe(cls) -> Probe:
        device = DeviceInfo(0, _cpu_name(), CpuMemory().total_bytes() or None)
        return Probe(True, f"{available_cores()} cores", (device,))

    @classmethod
    def launch_env(cls, world: World, environment: Mapping[str, str]) -> Mapping[str, str]:
        if world.local_size == 1 or THREADS in environment:
            return {}
        return {THREADS: str(max(1, idle_cores() // world.local_size))}

    def open(self, local_rank: int, *, threads: int | None, deterministic: bool) -> torch.device:
        torch.set_num_threads(threads or given_threads(os.environ) or idle_cores())
        torch.use_deterministic_algorithms(deterministic)
        return torch.device("cpu")

    def synchronize(self) -> None:
        """Nothing to wait for: the CPU computes in the calling thread."""

    @property
    def dist(self) -> DistSpec:
        return DistSpec("gloo", frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16}))

    @property
    def precision(self) -> PrecisionCaps:
        compute = frozenset({torch.float32, torch.bfloat16, torch.float16})
        if has_bf16_matmul():
            return PrecisionCaps(compute, torch.bfloat16, "the CPU multiplies bf16 matrices in hardware (AMX)")
        return PrecisionCaps(compute, torch.float32, "the CPU has no AMX: bf16 would be slower than fp32")

    @property
    def peak_flops(self) -> Mapping[torch.dtype, float]:
        return {}  # depends on clocks and on what else runs; no datasheet figure means anything here

    def kernels(self) -> Sequence[KernelSpec]:
        return KERNELS

    def build_optimizer(
        self, groups: Iterable[dict[str, Any]], *, betas: tuple[float, float], eps: float
    ) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)  # one pass over memory instead of a dozen

    @classmethod
    def diagnostics(cls) -> list[Diagnosis]:
        cores, idle = available_cores(), idle_cores()
        threads = Diagnosis("cpu threads", idle == cores, f"{cores} cores, load leaves about {idle} idle")
        if not threads.ok:
            fix = f"stop other work, or pass backend.threads={idle}: threads that wait for each other are far slower"
            threads = Diagnosis(threads.subject, False, threads.found, fix)
        bf16 = "multiplied in hardware (AMX)" if has_bf16_matmul() else "emulated: train in fp32"
        return [threads, Diagnosis("cpu bf16", True, bf16)]


def idle_cores() -> int:
    """Cores left by the load of the last minute, at least one; all of them where this process has its own share of a
    larger machine, whose load says nothing about it.

    Two threads on a busy two-core machine were measured 15 times slower than one: each waits at every barrier for a
    thread that is not running.
    """
    cores = available_cores()
    if cores != os.cpu_count():
        return cores
    return max(1, min(cores, round(cores - os.getloadavg()[0])))


def given_threads(environment: Mapping[str, str]) -> int | None:
    """The threads that the environment allows; a list says those of each level of nesting, of which PyTorch has one."""
    first = environment.get(THREADS, "").partition(",")[0]
    return int(first) or None if first.isdecimal() else None


def has_bf16_matmul() -> bool:
    """Whether the CPU has matrix instructions for bf16."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return False  # an older torch, which cannot tell
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def _cpu_name() -> str:
    for line in _read_lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "CPU"


def _proc_kilobytes(path: str, key: str) -> int:
    for line in _read_lines(path):
        if line.startswith(key):
            return int(line.split()[1])
    return 0


def _read_lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
