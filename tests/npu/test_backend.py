"""Opening an NPU, and what the backend tells and keeps of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from llava_core.errors import BackendUnavailable
from llava_npu.backend import NpuBackend
from llava_npu.devices import is_second_generation, soc_name

pytestmark = pytest.mark.npu

PROBE = """
import json, torch
from llava_npu.backend import NpuBackend
probe = NpuBackend.probe()
print(json.dumps([probe.available, probe.reason, len(probe.devices), torch.npu.is_initialized()]))
"""


def probe_in_a_fresh_process(**environment: str) -> list[object]:
    command, environment = [sys.executable, "-c", PROBE], os.environ | environment
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def test_probe_finds_the_devices_and_opens_none(device: torch.device) -> None:
    available, reason, num_devices, initialized = probe_in_a_fresh_process()
    assert available, reason
    assert num_devices == torch.npu.device_count()
    assert not initialized


@pytest.mark.parametrize(
    ("visible", "said"), [("1,0", "must ascend, as in 0,1"), ("99", "that exist"), ("", "numbers")]
)
def test_probe_says_why_no_device_is_visible(device: torch.device, visible: str, said: str) -> None:
    available, reason, _, _ = probe_in_a_fresh_process(ASCEND_RT_VISIBLE_DEVICES=visible)
    assert not available
    assert said in str(reason)


def test_a_simulated_device_says_so(device: torch.device) -> None:
    probe = NpuBackend.probe()
    assert ("simulated" in probe.devices[0].name) == ("ASCEND_SIMULATOR" in os.environ)
    assert ("SIMULATED" in probe.reason) == ("ASCEND_SIMULATOR" in os.environ)


def test_open_makes_the_device_current_and_keeps_fp32_exact(device: torch.device) -> None:
    assert device == torch.device("npu", 0)
    assert torch.npu.current_device() == 0
    assert torch.npu.is_jit_compile_false()
    assert not torch.npu.matmul.allow_hf32
    assert not torch.npu.conv.allow_hf32


def test_a_rank_without_a_device_is_refused(backend: NpuBackend, device: torch.device) -> None:
    with pytest.raises(BackendUnavailable, match="local rank 99 needs device 99"):
        backend.open(99, threads=None, deterministic=False)


def test_saturating_arithmetic_is_refused(device: torch.device) -> None:
    if not is_second_generation(str(soc_name())):
        pytest.skip("this chip always saturates, and computes in fp32 alone for that")
    # torch_npu reads it once in a process.
    program = "from llava_npu.backend import NpuBackend; NpuBackend().open(0, threads=1, deterministic=False)"
    environment = {**os.environ, "INF_NAN_MODE_FORCE_DISABLE": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert "BackendUnavailable: torch_npu is told to saturate" in done.stderr


def test_determinism_is_honoured(backend: NpuBackend, device: torch.device) -> None:
    backend.open(0, threads=None, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    x = torch.randn(128, 128, device=device)
    assert torch.equal(x @ x, x @ x)


def test_the_peak_rises_and_can_be_reset(backend: NpuBackend, device: torch.device) -> None:
    backend.memory.reset_peak()
    before = backend.memory.peak_bytes()
    block = torch.empty(64 * 2**20, dtype=torch.uint8, device=device)
    assert backend.memory.peak_bytes() >= before + block.numel()
    del block
    backend.memory.reset_peak()
    assert backend.memory.peak_bytes() < before + 64 * 2**20
    assert backend.memory.total_bytes() > 2**30


def test_random_states_return(backend: NpuBackend, device: torch.device) -> None:
    backend.rng.seed(7)
    state = backend.rng.state()
    assert all(s.device.type == "cpu" and s.dtype == torch.uint8 for s in state.values())
    first = torch.rand(5), torch.rand(5, device=device).cpu()
    backend.rng.load_state(state)
    again = torch.rand(5), torch.rand(5, device=device).cpu()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_state_from_other_hardware_seeds_the_device(backend: NpuBackend, device: torch.device) -> None:
    backend.rng.seed(7)
    elsewhere = {"host": backend.rng.state()["host"]}
    expected = torch.rand(5, device=device).cpu()
    backend.rng.seed(8)
    backend.rng.load_state(elsewhere)
    assert torch.equal(torch.rand(5, device=device).cpu(), expected)


def test_the_optimizer_is_fused(backend: NpuBackend, device: torch.device) -> None:
    weight = torch.nn.Parameter(torch.randn(8, device=device))
    optimizer = backend.build_optimizer(
        [{"params": [weight], "lr": 0.1, "weight_decay": 0.0}], betas=(0.9, 0.99), eps=1e-8
    )
    weight.grad = torch.ones_like(weight)
    before = weight.detach().clone()
    optimizer.step()
    backend.synchronize()
    # Adam's first step is lr · sign(gradient), up to eps.
    torch.testing.assert_close(weight.detach().cpu(), before.cpu() - 0.1)


def test_precision_is_the_chips_own_answer(backend: NpuBackend, device: torch.device) -> None:
    assert (torch.bfloat16 in backend.precision.compute) == torch.npu.is_bf16_supported()
    assert backend.precision.default in backend.precision.compute
