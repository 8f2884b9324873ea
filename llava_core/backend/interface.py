"""The Backend interface: how the model and the training loop reach the hardware."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch

from llava_core.backend.facts import ConfigProblem, Diagnosis, DistSpec, PrecisionCaps, Probe, World
from llava_core.backend.kernels import KernelSpec
from llava_core.backend.patches import Patch


class Memory(ABC):
    """Memory statistics of the opened device, in bytes."""

    @abstractmethod
    def peak_bytes(self) -> int:
        """The most that was in use since the last reset."""

    @abstractmethod
    def reset_peak(self) -> None:
        """Start a new peak measurement."""

    @abstractmethod
    def total_bytes(self) -> int:
        """How much the device has."""


class Rng(ABC):
    """The device's random state."""

    @abstractmethod
    def seed(self, seed: int) -> None:
        """Seed every generator that a run on this device draws from."""

    @abstractmethod
    def state(self) -> Mapping[str, torch.Tensor]:
        """The generators' states, as uint8 tensors on the host; PyTorch's own on the host is `host`."""

    @abstractmethod
    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Return to a state taken by `state`; one of other hardware has `host` alone in common, which is enough."""


class Backend(ABC):
    """One kind of hardware. A plugin subclasses it; the core asks it and never branches on its name.

    Construction touches no device. `probe` says whether it can run; `open` claims a device.
    """

    name: ClassVar[str]
    device_type: ClassVar[str]

    memory: Memory
    rng: Rng

    @classmethod
    @abstractmethod
    def probe(cls) -> Probe:
        """Whether this backend can run here. Creates no device context and never raises."""

    @classmethod
    def launch_env(cls, world: World, environment: Mapping[str, str]) -> Mapping[str, str]:
        """What a launcher adds to `environment` for each process of `world`. Pure; what the user set is kept.

        Raises:
            BackendUnavailable: a setting of the user's under which the processes could not run.
        """
        return {}

    @abstractmethod
    def open(self, local_rank: int, *, threads: int | None, deterministic: bool) -> torch.device:
        """Claim the device of this process and make it current.

        Args:
            local_rank: which of the machine's devices.
            threads: host threads for compute; None lets the backend choose.
            deterministic: ask PyTorch for bit-reproducible kernels.
        """

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the device has done all that was asked of it."""

    @property
    @abstractmethod
    def dist(self) -> DistSpec:
        """How processes on this hardware communicate."""

    @property
    def pins_memory(self) -> bool:
        """Whether PyTorch can pin host memory for this device, so that neither waits while tensors are copied."""
        return False

    @property
    @abstractmethod
    def precision(self) -> PrecisionCaps:
        """What this hardware computes in."""

    @property
    @abstractmethod
    def peak_flops(self) -> Mapping[torch.dtype, float]:
        """The device's dense matmul peak in FLOP/s by dtype, for model-FLOPs utilisation; empty where unknown."""

    @abstractmethod
    def kernels(self) -> Sequence[KernelSpec]:
        """Every kernel this backend could offer, installed or not. The core adds the references."""

    def build_optimizer(
        self, groups: Iterable[dict[str, Any]], *, betas: tuple[float, float], eps: float
    ) -> torch.optim.Optimizer | None:
        """This hardware's own AdamW over `groups` (`params`, `lr`, `weight_decay` each); None for the reference."""
        return None

    def patches(self) -> Sequence[Patch]:
        """What this backend changes in libraries that are not its own; whoever loads such a library applies them."""
        return ()

    def profiler(self, folder: Path) -> AbstractContextManager[object]:
        """Records what host and device do; at its end it writes a trace into `folder`, for TensorBoard or Perfetto."""
        return torch.profiler.profile(on_trace_ready=torch.profiler.tensorboard_trace_handler(str(folder)))

    def check_config(self, config: object) -> list[ConfigProblem]:
        """Settings of a `RunConfig` that this backend cannot honour. Never changes the config."""
        return []

    @classmethod
    def diagnostics(cls) -> list[Diagnosis]:
        """What `llava-core doctor` should say about this backend's environment. Never raises."""
        return []
