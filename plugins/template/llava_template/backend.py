"""The backend: what llava-core asks of this hardware, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from llava_core.backend import (
    Backend,
    ConfigProblem,
    DeviceInfo,
    Diagnosis,
    DistSpec,
    KernelSpec,
    PrecisionCaps,
    Probe,
)
from llava_core.config import RunConfig
from llava_core.errors import BackendUnavailable
from llava_template.device import CLEAR, STATUS, SYSTEM, TemplateMemory, TemplateRng, read_bytes
from llava_template.kernels import KERNELS


class TemplateBackend(Backend):
    """The host, in the place of a vendor's device."""

    name = "template"
    device_type = "cpu"  # VENDOR: torch.device's type, e.g. the name of your PrivateUse1 device

    def __init__(self) -> None:
        self.memory = TemplateMemory()
        self.rng = TemplateRng()

    @classmethod
    def probe(cls) -> Probe:
        # VENDOR: is the driver there, the library, a device? Look at files and versions; create no context, for every
        # listing asks. Catch what your library raises and make it the reason: a probe that raises is a broken plugin.
        if not STATUS.exists():
            return Probe(False, "its memory counters are Linux's, and this system has no /proc")
        # VENDOR: one DeviceInfo a device; the memory is None where it cannot be known without opening the device.
        return Probe(True, "the host stands in for a device", (DeviceInfo(0, "host", read_bytes(SYSTEM, "MemTotal:")),))

    def open(self, local_rank: int, *, threads: int | None, deterministic: bool) -> torch.device:
        found = self.probe()
        if not found.available:
            raise BackendUnavailable(f"backend {self.name!r} cannot run here: {found.reason}.")
        if threads is not None:
            torch.set_num_threads(threads)
        # VENDOR: whatever else your kernels need to give the same bits each time; raise where that cannot be had.
        torch.use_deterministic_algorithms(deterministic)
        # VENDOR: refuse a local_rank without a device, make the device current, return torch.device(type, local_rank).
        return torch.device(self.device_type)

    def synchronize(self) -> None:
        """Nothing to wait for: the host computes in the calling thread."""  # VENDOR: wait for the device

    @property
    def dist(self) -> DistSpec:
        # VENDOR: your process group, and the dtypes that it sums exactly as PyTorch does. What must be in a process's
        # environment before it starts, override `launch_env` for.
        return DistSpec("gloo", frozenset({torch.float32, torch.bfloat16}))

    @property
    def precision(self) -> PrecisionCaps:
        # VENDOR: what the hardware computes in, what `precision: auto` takes, and why. Facts, not version numbers.
        compute = frozenset({torch.float32, torch.bfloat16})
        return PrecisionCaps(compute, torch.float32, "few hosts multiply bf16 in hardware")

    @property
    def peak_flops(self) -> Mapping[torch.dtype, float]:
        return {}  # VENDOR: e.g. {torch.bfloat16: 312e12}, dense, from the datasheet; empty where unknown

    def kernels(self) -> Sequence[KernelSpec]:
        return KERNELS

    def build_optimizer(
        self, groups: Iterable[dict[str, Any]], *, betas: tuple[float, float], eps: float
    ) -> torch.optim.Optimizer:
        # VENDOR: your fused AdamW; or leave this method out, and PyTorch's plain one is used.
        return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)

    # VENDOR: `log.profile_steps` records by torch.profiler; override `profiler` where that does not see your device.

    def check_config(self, config: object) -> list[ConfigProblem]:
        # VENDOR: each setting that cannot be honoured, so that it is refused before any weight is read.
        if isinstance(config, RunConfig) and config.train.compile:
            remedy = "set train.compile=false"
            return [ConfigProblem("train.compile", "true", "false: no compiler was tried on this device", remedy)]
        return []

    @classmethod
    def diagnostics(cls) -> list[Diagnosis]:
        # VENDOR: what support asks a user first: driver, firmware, environment variables; each with its one fix.
        if CLEAR.exists():
            return [Diagnosis(f"{cls.name} memory counters", True, "can be reset")]
        fix = "mount /proc for reading and writing"
        return [Diagnosis(f"{cls.name} memory counters", False, f"{CLEAR} is missing", fix)]
