"""Backends with one defect each. Classes, so that another process finds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llava_core.backend import DistSpec, KernelSpec, Patch, PrecisionCaps, Probe, Yes
from llava_core.backend.patches import Undo
from llava_core.errors import PatchRefused
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


class Library:
    """Stands for another library's class."""

    def answer(self) -> int:
        return 41


class Patching(CpuBackend):
    """Patches `Library.answer`, and without a defect."""

    def patches(self) -> Sequence[Patch]:
        target = f"{__name__}:Library.answer"
        text = {"why": "41 is wrong", "source": "this file", "remove_when": "it says 42"}
        return [Patch(name="answer", target=target, applies=Yes, load=lambda: None, apply=self.apply, **text)]

    def apply(self) -> Undo:
        original = Library.answer
        Library.answer = lambda library: original(library) + 1  # type: ignore[method-assign]
        return partial(setattr, Library, "answer", original)


class RefusingPatch(Patching):
    def apply(self) -> Undo:
        raise PatchRefused("expected 41; found 40")


class PatchNotUndone(Patching):
    """Its undo brings the old answer back, but not the old method."""

    def apply(self) -> Undo:
        original, _ = Library.answer, super().apply()
        return partial(setattr, Library, "answer", lambda library: original(library))


class PatchLeavesMore(Patching):
    def apply(self) -> Undo:
        Library.asked = 1  # type: ignore[attr-defined]
        return super().apply()


class PatchRefusedTooLate(Patching):
    def apply(self) -> Undo:
        super().apply()
        raise PatchRefused("expected 41; found 40")


class PatchBreaks(Patching):
    def apply(self) -> Undo:
        raise AttributeError("type object 'Library' has no attribute 'reply'")


class PatchWithoutEffect(Patching):
    def apply(self) -> Undo:
        return lambda: None
