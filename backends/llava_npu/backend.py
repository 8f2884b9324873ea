"""The NPU backend: Huawei Ascend through torch_npu."""

from __future__ import annotations

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
    World,
)
from llava_core.config.schema import RunConfig
from llava_core.errors import BackendUnavailable
from llava_npu import devices, launching, probing
from llava_npu.kernels import KERNELS


def torch_npu() -> Any:
    """The module `torch.npu`, which exists once torch_npu is imported."""
    return torch.get_device_module("npu")


class NpuMemory(Memory):
    """What torch_npu's caching allocator handed out on the current device; what it holds in reserve is not counted."""

    def peak_bytes(self) -> int:
        return int(torch_npu().max_memory_allocated())

    def reset_peak(self) -> None:
        torch_npu().reset_peak_memory_stats()

    def total_bytes(self) -> int:
        return int(torch_npu().get_device_properties(torch_npu().current_device()).total_memory)


class NpuRng(Rng):
    """PyTorch's host generator, from which data order and initialisation draw, and the current device's."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)  # seeds every device's generator as well

    def state(self) -> Mapping[str, torch.Tensor]:
        return {"host": torch.get_rng_state(), "npu": torch_npu().get_rng_state()}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """A state taken on other hardware has no `npu`: the device is then seeded with the host's own seed."""
        torch.set_rng_state(state["host"])
        if "npu" in state:
            torch_npu().set_rng_state(state["npu"])
        else:
            torch_npu().manual_seed(torch.initial_seed())


class NpuBackend(Backend):
    """Ascend NPUs: torch_npu's fused ops where the chip has them, plain PyTorch elsewhere."""

    name = "npu"
    device_type = "npu"

    def __init__(self) -> None:
        self.memory = NpuMemory()
        self.rng = NpuRng()

    @classmethod
    def probe(cls) -> Probe:
        facts = probing.gather()
        reason = probing.reason_unavailable(facts)
        if reason is not None:
            return Probe(False, reason)
        return Probe(True, probing.describe(facts), probing.list_devices(facts.num_devices))

    @classmethod
    def launch_env(cls, world: World, environment: Mapping[str, str]) -> Mapping[str, str]:
        return launching.launch_env(world, environment)

    def open(self, local_rank: int, *, threads: int | None, deterministic: bool) -> torch.device:
        """As the interface says; `threads` None leaves torch's own choice, for the NPU does the computing.

        Raises:
            BackendUnavailable: no such device, or one that compiles each operator anew for each shape.
        """
        facts = probing.gather()
        reason = probing.reason_unavailable(facts)
        if reason is not None:
            raise BackendUnavailable(f"the npu backend cannot run here: {reason}.")
        if not 0 <= local_rank < facts.num_devices:
            raise BackendUnavailable(
                f"local rank {local_rank} needs device {local_rank}, and {facts.num_devices} are visible: start at "
                f"most {facts.num_devices} processes on this machine, or widen {probing.VISIBLE}."
            )
        if threads is not None:
            torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)  # torch_npu passes it on to its operators and to HCCL
        keep_fp32_exact()
        device = torch.device("npu", local_rank)
        torch_npu().set_device(device)
        use_built_operators()
        return device

    def synchronize(self) -> None:
        torch_npu().synchronize()

    @property
    def dist(self) -> DistSpec:
        # HCCL also sums fp64 and integers; nothing here needs them.
        return DistSpec("hccl", self.precision.compute)

    @property
    def precision(self) -> PrecisionCaps:
        return devices.precision_caps(devices.soc_name())

    @property
    def peak_flops(self) -> Mapping[torch.dtype, float]:
        return {}  # Huawei publishes no dense peak by chip name; a guess would make every utilisation a guess

    def kernels(self) -> Sequence[KernelSpec]:
        return KERNELS

    def build_optimizer(
        self, groups: Iterable[dict[str, Any]], *, betas: tuple[float, float], eps: float
    ) -> torch.optim.Optimizer:
        """torch's fused AdamW, whose operator torch_npu implements; torch_npu's own flattens the parameters, which
        sharded ones cannot be."""
        return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)

    def check_config(self, config: object) -> list[ConfigProblem]:
        """`train.compile` needs Triton for Ascend; precision and kernels are checked where they are chosen."""
        if not isinstance(config, RunConfig) or not config.train.compile or find_spec("triton") is not None:
            return []
        remedy = "install triton-ascend, or set train.compile=false"
        return [ConfigProblem("train.compile", "true", "triton, which is not installed", remedy)]

    @classmethod
    def diagnostics(cls) -> list[Diagnosis]:
        return probing.diagnose(probing.gather())


def keep_fp32_exact() -> None:
    """fp32 means fp32: by default convolutions run in HF32 (11 bits of mantissa), and older chips multiply fp32
    matrices in fp16 (torch_npu's `npu_config.py`; CANN's documentation of ACL_PRECISION_MODE)."""
    module = torch_npu()
    module.matmul.allow_hf32 = False
    module.conv.allow_hf32 = False
    module.set_option({"ACL_PRECISION_MODE": "must_keep_origin_dtype"})


def use_built_operators() -> None:
    """Runs CANN's built operators, in place of compiling each one for each new shape, which packed samples always have.

    Raises:
        BackendUnavailable: this CANN has none for this chip, and compiles all the same.
    """
    module = torch_npu()
    module.set_compile_mode(jit_compile=False)
    if not module.is_jit_compile_false():
        raise BackendUnavailable(
            "torch_npu compiles operators for each shape although it was told not to: install CANN's operator "
            "package (the `kernels` package) for this chip."
        )
