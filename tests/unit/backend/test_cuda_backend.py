"""The cuda backend's probe, diagnoses, devices and determinism, tested without a GPU."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_core.backend import KernelSpec, MaskFacts, OpRequest
from llava_core.config.data import DataConfig
from llava_core.config.schema import BatchConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from llava_core.errors import BackendUnavailable
from llava_cuda import backend, devices, kernels, probing
from llava_cuda.backend import CudaBackend

CPU = torch.device("cpu")
USABLE = probing.Facts("2.13.0", "13.0", "580.65.06", None, num_listed=8, usable=True)
HOPPER, AMPERE, ADA, VOLTA = (9, 0), (8, 0), (8, 9), (7, 0)
PACKED = MaskFacts(packed=True, causal=True)
DENSE = MaskFacts(packed=False, causal=True)
DECODE = MaskFacts(packed=False, causal=True, unequal_lengths=True)
PADDED = MaskFacts(packed=False, causal=True, key_padding=True, unequal_lengths=True)
WINDOW = MaskFacts(packed=False, causal=True, window=4096)

without_cuda = pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for CUDA")


def attention_request(*masks: MaskFacts, **changes: Any) -> OpRequest:
    """The language model of a 7B LLaVA."""
    request = OpRequest("attention", "attention", torch.bfloat16, True, False, 128, 32, 32, masks or (PACKED,), 2048)
    return replace(request, **changes)


def offer(op: str, name: str) -> KernelSpec:
    return next(k for k in kernels.KERNELS if (k.op, k.name) == (op, name))


# ---- probe -------------------------------------------------------------------------------------------------------


@without_cuda
def test_this_build_says_that_it_has_no_cuda() -> None:
    probe = CudaBackend.probe()
    assert not probe.available
    assert probe.reason == f"torch {torch.__version__} is built without CUDA: install a CUDA build of torch"
    assert probe.devices == ()
    assert not torch.cuda.is_initialized()


@without_cuda
def test_open_refuses_with_the_same_reason() -> None:
    with pytest.raises(BackendUnavailable, match="cannot run here: torch .* is built without CUDA"):
        CudaBackend().open(0, threads=None, deterministic=False)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (replace(USABLE, built_for=None), "is built without CUDA"),
        (replace(USABLE, usable=False, num_listed=0, driver=None), "no NVIDIA driver is loaded"),
        (replace(USABLE, usable=False, num_listed=0, visible=""), "CUDA_VISIBLE_DEVICES='' leaves no device"),
        (replace(USABLE, usable=False, num_listed=0, visible="9"), "CUDA_VISIBLE_DEVICES='9' leaves no device"),
        (replace(USABLE, usable=False), "update the driver"),
        (replace(USABLE, usable=False, num_listed=0, complaint="The NVIDIA driver is too old"), "update the driver"),
        (replace(USABLE, usable=False, num_listed=0), "lists no device"),
    ],
    ids=["cpu-build", "no-driver", "hidden", "wrong-index", "old-driver", "old-driver-says-so", "no-device"],
)
def test_each_obstacle_has_its_own_reason(facts: probing.Facts, said: str) -> None:
    reason = probing.reason_unavailable(facts)
    assert reason is not None
    assert said in reason


def test_a_working_machine_has_no_obstacle() -> None:
    assert probing.reason_unavailable(USABLE) is None
    # A container may hide /proc's driver file from a GPU that works.
    assert probing.reason_unavailable(replace(USABLE, driver=None)) is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("NVIDIA H200, 143771, Disabled\n" * 8, ("NVIDIA H200", 143771 * 2**20)),
        ("NVIDIA L4, 23034, [N/A]\n", ("NVIDIA L4", 23034 * 2**20)),
        ("NVIDIA GH200, [N/A], [N/A]\n", ("NVIDIA GH200", None)),
        ("NVIDIA A100-SXM4-80GB, 81920, Enabled\n", None),
        ("NVIDIA L4, 23034, [N/A]\nNVIDIA A10, 23028, [N/A]\n", None),
        ("Failed to initialize NVML: Driver/library version mismatch\n", None),
        ("", None),
    ],
    ids=["alike", "no-mig", "no-memory", "mig", "mixed", "error", "nothing"],
)
def test_devices_are_named_only_where_there_is_no_doubt(text: str, found: tuple[str, int | None] | None) -> None:
    assert probing.parse_smi(text) == found


def test_the_drivers_version_is_read_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "version"
    assert probing.driver_version(file) is None
    file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (x)\nGCC 11.4.0\n"
    )
    assert probing.driver_version(file) == "580.65.06"


# ---- doctor ------------------------------------------------------------------------------------------------------


def test_doctor_names_every_optional_library() -> None:
    lines = {line.subject: line for line in CudaBackend.diagnostics()}
    assert {f"cuda {name}" for name, _ in probing.OPTIONAL_LIBRARIES} < set(lines)
    assert all(line.fix for line in lines.values() if not line.ok)


def test_a_cpu_build_beside_an_nvidia_driver_is_a_mistake() -> None:
    (build, *_) = probing.diagnose(replace(USABLE, built_for=None))
    assert not build.ok
    assert "CUDA build of torch" in build.fix
    (build, *_) = probing.diagnose(replace(USABLE, built_for=None, driver=None))
    assert build.ok


def test_a_driver_without_a_device_is_told_how_to_mend_it() -> None:
    (_, driver, *_) = probing.diagnose(replace(USABLE, usable=False, num_listed=0, visible=""))
    assert not driver.ok
    assert "CUDA_VISIBLE_DEVICES" in driver.fix


def test_a_library_is_looked_for_and_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "crashing_vendor.py").write_text("raise SystemExit('imported')")
    info = tmp_path / "crashing_vendor-3.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: crashing-vendor\nVersion: 3.2\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert probing.library_state("crashing-vendor", "crashing_vendor") == "installed 3.2"
    assert probing.library_state("other-name", "crashing_vendor") == "installed, version unknown"
    assert "cannot be found" in probing.library_state("crashing-vendor", "no_such_module")
    assert probing.library_state("no-such-library", "no_such.module") == "not installed (optional)"


# ---- devices -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA L40S", 362.05e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_the_peak_is_that_of_the_product_and_of_no_other(name: str, bf16: float | None) -> None:
    assert devices.peak_flops(name).get(torch.bfloat16) == bf16


def test_bf16_is_the_default_where_the_hardware_multiplies_it() -> None:
    assert devices.precision_caps(AMPERE).default == torch.bfloat16
    old = devices.precision_caps(VOLTA)
    assert old.default == torch.float32
    assert torch.bfloat16 not in old.compute
    assert torch.float16 in old.compute
    assert devices.precision_caps(None).compute == {torch.float32}


# ---- determinism, optimizer --------------------------------------------------------------------------------------


def test_determinism_sets_cublas_up_while_there_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.WORKSPACE, "")
    monkeypatch.delenv(backend.WORKSPACE)
    backend.require_reproducible_cublas(initialized=False)
    assert backend.os.environ[backend.WORKSPACE] == ":4096:8"
    backend.require_reproducible_cublas(initialized=True)


@pytest.mark.parametrize(("found", "initialized"), [(None, True), (":0:0", False), (":0:0", True)])
def test_determinism_that_cannot_be_had_is_refused(
    found: str | None, initialized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(backend.WORKSPACE, raising=False)
    if found is not None:
        monkeypatch.setenv(backend.WORKSPACE, found)
    with pytest.raises(BackendUnavailable, match="deterministic kernels need CUBLAS_WORKSPACE_CONFIG"):
        backend.require_reproducible_cublas(initialized=initialized)


def test_the_fused_optimizer_is_adamw() -> None:
    start = [torch.randn(5, 3), torch.randn(3)]
    results = []
    for build in (CudaBackend().build_optimizer, torch.optim.AdamW):
        params = [torch.nn.Parameter(x.clone()) for x in start]
        groups = [
            {"params": params[:1], "lr": 1e-2, "weight_decay": 0.1},
            {"params": params[1:], "lr": 3e-3, "weight_decay": 0.0},
        ]
        optimizer = build(groups, betas=(0.9, 0.95), eps=1e-6)
        for step in range(3):
            for p in params:
                p.grad = torch.full_like(p, 0.1 * (step + 1))
            optimizer.step()
        results.append(params)
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain)


def run_config(compiled: bool) -> RunConfig:
    return RunConfig(
        output=Path("run"),
        model=ModelConfig(path=Path("model")),
        data=DataConfig(path=Path("data.json"), template="plain"),
        batch=BatchConfig(global_size=1, micro_size=1),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        train=TrainConfig(trainable=("projector",), max_steps=1, compile=compiled),
    )


@pytest.mark.skipif(find_spec("triton") is not None, reason="triton is installed here")
def test_compiling_without_triton_is_a_problem_that_is_named() -> None:
    assert CudaBackend().check_config(run_config(False)) == []
    (problem,) = CudaBackend().check_config(run_config(True))
    assert problem.key == "train.compile"
    assert "triton" in str(problem)
