"""Backends with one defect each. Classes, so that another process finds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llava_core.backend import DistSpec, KernelSpec, PrecisionCaps, Probe
from llava_cpu.backend import CpuBackend, CpuMemory, CpuRng

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Mutant(CpuBackend):
    """The cpu backend with other kernels."""

    def __init__(self, *kernels: KernelSpec, dtypes: Sequence[torch.dtype] = DTYPES) -> None:
        super().__init__()
        self._kernels = kernels
        self._dtypes = frozenset(dtypes)

    def kernels(self) -> Sequence[KernelSpec]:
        return self._kernels

    @property
    def precision(self) -> PrecisionCaps:
        return PrecisionCaps(self._dtypes, next(iter(self._dtypes)), "a test's choice")


class ForgetfulRng(CpuRng):
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Does nothing."""


class UnseededRng(CpuRng):
    def seed(self, seed: int) -> None:
        torch.seed()


class GrowingMemory(CpuMemory):
    def reset_peak(self) -> None:
        """Does nothing."""


class MutedMemory(CpuMemory):
    def peak_bytes(self) -> int:
        return 1 << 20


class DefaultNotComputed(CpuBackend):
    @property
    def precision(self) -> PrecisionCaps:
        return PrecisionCaps(frozenset({torch.float32}), torch.bfloat16, "wishful")


class NoDecay(CpuBackend):
    def build_optimizer(self, groups: Any, *, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW([{**g, "weight_decay": 0.0} for g in groups], betas=betas, eps=eps)


class Amnesiac(torch.optim.AdamW):
    """Starts with fresh moments after a checkpoint."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.state.clear()


class LosesMoments(CpuBackend):
    def build_optimizer(self, groups: Any, *, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
        return Amnesiac(groups, betas=betas, eps=eps)


class SavesRounded(torch.optim.AdamW):
    """Hands out its moments in bf16."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for state in self.state.values():
            state["exp_avg"] = state["exp_avg"].bfloat16().float()
            state["exp_avg_sq"] = state["exp_avg_sq"] * 1.01
        return loss


class DriftingOptimizer(CpuBackend):
    def build_optimizer(self, groups: Any, *, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
        return SavesRounded(groups, betas=betas, eps=eps)


class RngWithoutHost(CpuRng):
    """Knows no state but its own."""

    def state(self) -> Mapping[str, Tensor]:
        return {"device": torch.get_rng_state()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        torch.set_rng_state(state["device"])


class RaisingProbe(CpuBackend):
    @classmethod
    def probe(cls) -> Probe:
        raise OSError("libvendor.so: cannot open shared object file")


class SilentProbe(CpuBackend):
    @classmethod
    def probe(cls) -> Probe:
        return replace(super().probe(), reason="")


class SumsWhatItCannot(CpuBackend):
    """States a dtype that its process group refuses."""

    @property
    def dist(self) -> DistSpec:
        return DistSpec("gloo", frozenset({torch.float32, torch.float8_e4m3fn}))


def with_part(**parts: Any) -> CpuBackend:
    """The cpu backend with its `rng` or `memory` exchanged."""
    backend = CpuBackend()
    for name, part in parts.items():
        setattr(backend, name, part)
    return backend
