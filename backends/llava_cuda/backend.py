"""The CUDA backend: NVIDIA GPUs through PyTorch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from llava_core.backend import (
    Backend,
    ConfigProblem,
    Diagnosis,
    DistSpec,
    KernelSpec,
    Memory,
    PrecisionCaps,
    Probe,
    Rng,
)
from llava_core.config.schema import RunConfig
from llava_core.errors import BackendUnavailable
from llava_cuda import devices, probing
from llava_cuda.kernels import KERNELS

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
REPRODUCIBLE_WORKSPACES = (":4096:8", ":16:8")
"""The values under which cuBLAS gives the same bits each time (cuBLAS manual, "Results reproducibility")."""


class CudaMemory(Memory):
    """What torch's caching allocator handed out on the current device; what it holds in reserve is not counted."""

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated()

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def total_bytes(self) -> int:
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)


class CudaRng(Rng):
    """PyTorch's host generator, from which data order and initialisation draw, and the current device's."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)  # seeds every device's generator as well

    def state(self) -> Mapping[str, torch.Tensor]:
        return {"host": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state()}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """A state taken on other hardware has no `cuda`: the device is then seeded with the host's own seed."""
        torch.set_rng_state(state["host"])
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"])
        else:
            torch.cuda.manual_seed(torch.initial_seed())


class CudaBackend(Backend):
    """NVIDIA GPUs: SDPA by default, and flash-attn, apex and Liger where they are installed."""

    name = "cuda"
    device_type = "cuda"

    def __init__(self) -> None:
        self.memory = CudaMemory()
        self.rng = CudaRng()

    @classmethod
    def probe(cls) -> Probe:
        facts = probing.gather()
        reason = probing.reason_unavailable(facts)
        if reason is not None:
            return Probe(False, reason)
        found = f"{facts.num_listed} device(s), driver {facts.driver or 'unknown'}, torch for CUDA {facts.built_for}"
        return Probe(True, found, probing.describe_devices(facts.num_listed))

    def open(self, local_rank: int, *, threads: int | None, deterministic: bool) -> torch.device:
        """As the interface says; `threads` None leaves torch's own choice, for the GPU does the computing.

        Raises:
            BackendUnavailable: no such device, or determinism that can no longer be had.
        """
        reason = probing.reason_unavailable(probing.gather())
        if reason is not None:
            raise BackendUnavailable(f"the cuda backend cannot run here: {reason}.")
        count = torch.cuda.device_count()
        if not 0 <= local_rank < count:
            raise BackendUnavailable(
                f"local rank {local_rank} needs device {local_rank}, and {count} are visible: start at most {count} "
                f"processes on this machine, or widen CUDA_VISIBLE_DEVICES."
            )
        if deterministic:
            require_reproducible_cublas(initialized=torch.cuda.is_initialized())
        if threads is not None:
            torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        # fp32 means fp32. torch's default is TF32 (10 bits of mantissa) for convolutions, though not for matmuls.
        torch.backends.cudnn.allow_tf32 = False
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return device

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    @property
    def dist(self) -> DistSpec:
        return DistSpec("nccl", frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16}))

    @property
    def pins_memory(self) -> bool:
        return True

    @property
    def precision(self) -> PrecisionCaps:
        return devices.precision_caps(devices.capability())

    @property
    def peak_flops(self) -> Mapping[torch.dtype, float]:
        return devices.peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else {}

    def kernels(self) -> Sequence[KernelSpec]:
        return KERNELS

    def build_optimizer(
        self, groups: Iterable[dict[str, Any]], *, betas: tuple[float, float], eps: float
    ) -> torch.optim.Optimizer:
        """torch's fused AdamW: the reference's update in one launch for many tensors.

        apex's FusedAdam does the same with the same number of passes over memory, and knows no DTensor.
        """
        return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)

    def check_config(self, config: object) -> list[ConfigProblem]:
        """`train.compile` needs Triton; precision and kernels are checked where they are chosen."""
        if not isinstance(config, RunConfig) or not config.train.compile:
            return []
        found = devices.capability()
        if find_spec("triton") is None:
            expected, remedy = "triton, which is not installed", "install it, or set train.compile=false"
        elif found is not None and found < devices.VOLTA:
            expected = f"compute capability 7.0, and the device has {found[0]}.{found[1]}"
            remedy = "set train.compile=false"
        else:
            return []
        return [ConfigProblem("train.compile", "true", expected, remedy)]

    @classmethod
    def diagnostics(cls) -> list[Diagnosis]:
        return probing.diagnose(probing.gather())


def require_reproducible_cublas(*, initialized: bool) -> None:
    """Sees to it that cuBLAS reuses one workspace, without which its results vary between runs.

    cuBLAS reads the setting when torch makes its first handle, so it can be set until CUDA is initialised.

    Raises:
        BackendUnavailable: it is too late, or the user chose another setting, which is not ours to overwrite.
    """
    found = os.environ.get(WORKSPACE)
    if found in REPRODUCIBLE_WORKSPACES:
        return
    if found is None and not initialized:
        os.environ[WORKSPACE] = REPRODUCIBLE_WORKSPACES[0]
        return
    late = " and CUDA has already been initialised" if initialized else ""
    raise BackendUnavailable(
        f"deterministic kernels need {WORKSPACE} to be one of {', '.join(REPRODUCIBLE_WORKSPACES)}; it is "
        f"{found!r}{late}. Set it in the environment before starting, or turn deterministic off."
    )
