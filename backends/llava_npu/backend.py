"""The NPU backend: Huawei Ascend through torch_npu."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from llava_core.backend import (
    Backend,
    ConfigProblem,
    Diagnosis,
    DistSpec,
    KernelSpec,
    Memory,
    Patch,
    PrecisionCaps,
    Probe,
    Rng,
    World,
)
from llava_core.config.schema import RunConfig
from llava_core.errors import BackendUnavailable
from llava_npu import devices, launching, probing
from llava_npu.kernels import KERNELS
from llava_npu.mindspeed import PATCHES


def npu_module() -> Any:
    """The module `torch.npu`, which exists once torch_npu is imported."""
    return torch.get_device_module("npu")


class NpuMemory(Memory):
    """What torch_npu's caching allocator handed out on the current device; what it holds in reserve is not counted."""

    def peak_bytes(self) -> int:
        return int(npu_module().max_memory_allocated())

    def reset_peak(self) -> None:
        npu_module().reset_peak_memory_stats()

    def total_bytes(self) -> int:
        return int(npu_module().get_device_properties(npu_module().current_device()).total_memory)


class NpuRng(Rng):
    """PyTorch's host generator, from which data order and initialisation draw, and the current device's."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)  # seeds every device's generator as well

    def state(self) -> Mapping[str, torch.Tensor]:
        return {"host": torch.get_rng_state(), "npu": npu_module().get_rng_state()}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """A state taken on other hardware has no `npu`: the device is then seeded with the host's own seed."""
        torch.set_rng_state(state["host"])
        if "npu" in state:
            npu_module().set_rng_state(state["npu"])
        else:
            npu_module().manual_seed(torch.initial_seed())


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
            BackendUnavailable: no such device, or one that compiles each operator anew for each shape, or is told to
                saturate where numbers overflow.
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
        npu_module().set_device(device)
        use_built_operators()
        require_infinity(devices.soc_name())
        return device

    def synchronize(self) -> None:
        npu_module().synchronize()

    @property
    def dist(self) -> DistSpec:
        # HCCL also sums fp64 and integers; nothing here needs them.
        return DistSpec("hccl", self.precision.compute)

    @property
    def pins_memory(self) -> bool:
        return True

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

    def patches(self) -> Sequence[Patch]:
        return PATCHES

    def profiler(self, folder: Path) -> AbstractContextManager[object]:
        """torch_npu's own profiler, which alone sees the device."""
        module = import_module("torch_npu").profiler
        level = module._ExperimentalConfig(profiler_level=module.ProfilerLevel.Level1)
        activities = [module.ProfilerActivity.CPU, module.ProfilerActivity.NPU]
        handler = module.tensorboard_trace_handler(str(folder))
        found = module.profile(activities=activities, on_trace_ready=handler, experimental_config=level)
        assert isinstance(found, AbstractContextManager)
        return found

    def check_config(self, config: object) -> list[ConfigProblem]:
        """`train.compile` needs Triton for Ascend, and the profiler a real device."""
        problems: list[ConfigProblem] = []
        if not isinstance(config, RunConfig):
            return problems
        if config.train.compile and find_spec("triton") is None:
            remedy = "install triton-ascend, or set train.compile=false"
            problems.append(ConfigProblem("train.compile", "true", "triton, which is not installed", remedy))
        steps = config.log.profile_steps
        if steps is not None and probing.gather().simulator is not None:
            remedy = "leave it out"
            problems.append(ConfigProblem("log.profile_steps", str(list(steps)), "a real NPU, not a simulator", remedy))
        return problems

    @classmethod
    def diagnostics(cls) -> list[Diagnosis]:
        return probing.diagnose(probing.gather())


def keep_fp32_exact() -> None:
    """fp32 means fp32: by default convolutions run in HF32 (11 bits of mantissa), and older chips multiply fp32
    matrices in fp16 (torch_npu's `npu_config.py`; CANN's documentation of ACL_PRECISION_MODE)."""
    module = npu_module()
    module.matmul.allow_hf32 = False
    module.conv.allow_hf32 = False
    module.set_option({"ACL_PRECISION_MODE": "must_keep_origin_dtype"})


def use_built_operators() -> None:
    """Runs CANN's built operators, in place of compiling each one for each new shape, which packed samples always have.

    Raises:
        BackendUnavailable: this CANN has none for this chip, and compiles all the same.
    """
    module = npu_module()
    module.set_compile_mode(jit_compile=False)
    if not module.is_jit_compile_false():
        raise BackendUnavailable(
            "torch_npu compiles operators for each shape although it was told not to: install CANN's operator "
            "package (the `kernels` package) for this chip."
        )


def require_infinity(soc: str | None) -> None:
    """That what overflows becomes infinity, where the chip can: a step is judged by whether its gradient is finite.

    Raises:
        BackendUnavailable: the environment asks torch_npu for saturation.
    """
    if soc is None or not devices.is_second_generation(soc) or npu_module().utils.is_support_inf_nan():
        return
    raise BackendUnavailable(
        f"torch_npu is told to saturate on {soc}, so that neither the fp16 loss scale nor the check for non-finite "
        "gradients would see an overflow: unset INF_NAN_MODE_ENABLE and INF_NAN_MODE_FORCE_DISABLE."
    )
