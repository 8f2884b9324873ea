"""The npu backend's probe, diagnoses, chips and launching, tested without an NPU and without torch_npu."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_core.backend import World
from llava_core.config.data import DataConfig
from llava_core.config.schema import (
    BatchConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from llava_core.errors import BackendUnavailable
from llava_npu import devices, launching, probing
from llava_npu.backend import NpuBackend

USABLE = probing.Facts("2.13.0+cpu", "2.13.0.post1", None, "8.5.0", "25.2.0", None, num_devices=8)

without_npu = pytest.mark.skipif(find_spec("torch_npu") is not None, reason="torch_npu is installed")


# ---- probe -------------------------------------------------------------------------------------------------------


@without_npu
def test_this_machine_says_that_torch_npu_is_missing() -> None:
    probe = NpuBackend.probe()
    assert not probe.available
    wanted = torch.__version__.partition("+")[0]
    assert probe.reason.startswith(f"torch_npu is not installed: pip install torch-npu=={wanted}")


@without_npu
def test_open_refuses_with_the_same_reason() -> None:
    with pytest.raises(BackendUnavailable, match="cannot run here: torch_npu is not installed"):
        NpuBackend().open(0, threads=None, deterministic=False)


NO_DEVICE = replace(USABLE, num_devices=0)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (replace(USABLE, torch_npu_version=None), "torch_npu is not installed"),
        (replace(USABLE, torch_npu_version="2.7.1.post2"), "needs torch 2.7.1, and torch 2.13.0+cpu is installed"),
        (replace(NO_DEVICE, import_error="ImportError: libhccl.so", cann=None), "source CANN's set_env.sh"),
        (replace(NO_DEVICE, import_error="ImportError: libhccl.so"), "look at CANN 8.5.0's release notes"),
        (replace(NO_DEVICE, driver=None), "driver is not installed"),
        (NO_DEVICE, "driver 25.2.0 is installed but lists no device"),
        (replace(NO_DEVICE, visible="3,1"), "must ascend, as in 1,3"),
        (replace(NO_DEVICE, visible="0,0"), "must ascend, as in 0"),
        (replace(NO_DEVICE, visible="npu0"), "must be device numbers"),
        (replace(NO_DEVICE, visible="9"), "name devices that exist"),
    ],
)
def test_each_obstacle_has_its_own_reason(facts: probing.Facts, said: str) -> None:
    reason = probing.reason_unavailable(facts)
    assert reason is not None
    assert said in reason


def test_a_working_machine_has_no_obstacle() -> None:
    assert probing.reason_unavailable(USABLE) is None
    # A container may hide the driver's files from a device that works.
    assert probing.reason_unavailable(replace(USABLE, driver=None)) is None


@pytest.mark.parametrize(
    ("torch_version", "torch_npu_version", "fits"),
    [
        ("2.7.1", "2.7.1.post2", True),
        ("2.13.0+cpu", "2.13.0", True),
        ("2.7.1", "2.7.0", False),
        ("2.7", "2.7.1", False),
    ],
)
def test_torch_npu_must_be_of_torchs_own_release(torch_version: str, torch_npu_version: str, fits: bool) -> None:
    assert probing.versions_fit(torch_version, torch_npu_version) is fits


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("Version=25.2.0\nascendhal_version=7.35.23\n", "25.2.0"),  # the driver's
        ("package_name=Ascend-cann-toolkit\nversion=8.2.RC1\n", "8.2.RC1"),
        ("# comment\nruntime_running_version=[7.7.0.1:8.2.RC1]\n", "7.7.0.1:8.2.RC1"),
        ("nothing of it\n", None),
    ],
)
def test_versions_are_read_from_files(tmp_path: Path, text: str, version: str | None) -> None:
    assert probing.file_version(tmp_path / "absent") is None
    (tmp_path / "version.info").write_text(text)
    assert probing.file_version(tmp_path / "version.info") == version


# ---- doctor ------------------------------------------------------------------------------------------------------


def test_a_machine_without_any_of_it_needs_no_mending() -> None:
    bare = replace(USABLE, torch_npu_version=None, cann=None, driver=None, num_devices=0)
    assert all(line.ok for line in probing.diagnose(bare))


@pytest.mark.parametrize(
    "facts",
    [replace(USABLE, torch_npu_version=None), replace(USABLE, torch_npu_version="2.7.1", driver=None, cann=None)],
)
def test_half_of_it_does(facts: probing.Facts) -> None:
    (line, *_) = probing.diagnose(facts)
    assert not line.ok
    assert "torch_npu" in line.fix


def test_a_simulated_device_is_called_so() -> None:
    simulated = replace(USABLE, simulator="0.1.0", driver=None)
    assert "SIMULATED" in probing.describe(simulated)
    assert any("SIMULATED" in line.found for line in probing.diagnose(simulated))


# ---- chips -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("soc", ["Ascend910B1", "Ascend910B2C", "Ascend910B4-1", "Ascend910_9392", "Ascend950PR_9579"])
def test_from_atlas_a2_on_chips_compute_in_bf16(soc: str) -> None:
    caps = devices.precision_caps(soc)
    assert caps.default == torch.bfloat16
    assert caps.compute == {torch.float32, torch.bfloat16, torch.float16}


@pytest.mark.parametrize("soc", ["Ascend910A", "Ascend910ProB", "Ascend910B", "Ascend310P3"])
def test_chips_before_compute_in_fp32_alone(soc: str) -> None:
    caps = devices.precision_caps(soc)
    assert caps.compute == {torch.float32}
    assert "no bf16" in caps.reason


# ---- launching ---------------------------------------------------------------------------------------------------


def test_what_the_user_set_is_kept() -> None:
    added = launching.launch_env(World(8), {"TASK_QUEUE_ENABLE": "1"})
    assert "TASK_QUEUE_ENABLE" not in added
    assert added["PYTORCH_NPU_ALLOC_CONF"] == "expandable_segments:True"
    assert added["CPU_AFFINITY_CONF"] == "1"


def test_a_process_alone_may_run_on_every_core() -> None:
    assert "CPU_AFFINITY_CONF" not in launching.launch_env(World(1), {})


def test_the_allocator_is_not_configured_twice() -> None:
    assert "PYTORCH_NPU_ALLOC_CONF" not in launching.launch_env(World(8), {"PYTORCH_ALLOC_CONF": "x:1"})


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ASCEND_RT_VISIBLE_DEVICES": "1,0"}, "must ascend, as in 0,1"),
        ({"ASCEND_RT_VISIBLE_DEVICES": "0"}, "shows 1 device(s) to 2 processes: start at most 1"),
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "1"}, "unset it"),
    ],
)
def test_settings_under_which_processes_could_not_run_are_refused(environment: dict[str, str], said: str) -> None:
    with pytest.raises(BackendUnavailable) as refused:
        launching.launch_env(World(2), environment)
    assert said in str(refused.value)


def test_visible_devices_that_suffice_are_left_alone() -> None:
    assert "ASCEND_RT_VISIBLE_DEVICES" not in launching.launch_env(World(2), {"ASCEND_RT_VISIBLE_DEVICES": "2,5"})


# ---- config ------------------------------------------------------------------------------------------------------


def run_config(*, compile: bool = False, **log: Any) -> RunConfig:
    return RunConfig(
        output=Path("runs"),
        model=ModelConfig(path=Path("model")),
        data=DataConfig(path=Path("data.json")),
        batch=BatchConfig(global_size=1, micro_size=1),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        train=TrainConfig(trainable=("projector",), max_steps=1, compile=compile),
        log=LogConfig(**log),
    )


@pytest.mark.skipif(find_spec("triton") is not None, reason="triton is installed")
def test_compile_without_triton_is_a_problem() -> None:
    (problem,) = NpuBackend().check_config(run_config(compile=True))
    assert str(problem) == (
        "train.compile = true: expected triton, which is not installed; install triton-ascend, or set "
        "train.compile=false"
    )
    assert NpuBackend().check_config(run_config()) == []


def test_a_simulator_has_no_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(probing.SIMULATOR, "0.1.0")
    (problem,) = NpuBackend().check_config(run_config(profile_steps=(1, 1)))
    assert problem.key == "log.profile_steps"
    monkeypatch.delenv(probing.SIMULATOR)
    assert NpuBackend().check_config(run_config(profile_steps=(1, 1))) == []
