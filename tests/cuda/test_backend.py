"""Opening a GPU, and what the backend tells and keeps of it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from llava_core.errors import BackendUnavailable
from llava_cuda.backend import WORKSPACE, CudaBackend

pytestmark = pytest.mark.cuda

PROBE = """
import json, torch
from llava_cuda.backend import CudaBackend
probe = CudaBackend.probe()
print(json.dumps([probe.available, probe.reason, len(probe.devices), torch.cuda.is_initialized()]))
"""


def probe_in_a_fresh_process(**environment: str) -> list[object]:
    command = [sys.executable, "-c", f"import os; os.environ.update({environment!r})\n{PROBE}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return json.loads(done.stdout.splitlines()[-1])


def test_probe_finds_the_devices_and_opens_none(device: torch.device) -> None:
    available, reason, num_devices, initialized = probe_in_a_fresh_process()
    assert available, reason
    assert num_devices == torch.cuda.device_count()
    assert not initialized


def test_probe_says_that_devices_are_hidden(device: torch.device) -> None:
    available, reason, _, _ = probe_in_a_fresh_process(CUDA_VISIBLE_DEVICES="")
    assert not available
    assert "CUDA_VISIBLE_DEVICES=''" in str(reason)


def test_open_makes_the_device_current(backend: CudaBackend, device: torch.device) -> None:
    assert device == torch.device("cuda", 0)
    assert torch.cuda.current_device() == 0
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32


def test_a_rank_without_a_device_is_refused(backend: CudaBackend, device: torch.device) -> None:
    with pytest.raises(BackendUnavailable, match="local rank 99 needs device 99"):
        backend.open(99, threads=None, deterministic=False)


def test_determinism_is_honoured(backend: CudaBackend, device: torch.device) -> None:
    backend.open(0, threads=None, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    x = torch.randn(512, 512, device=device)
    assert torch.equal(x @ x, x @ x)


def test_determinism_too_late_is_refused(
    backend: CudaBackend, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.zeros(1, device=device)
    monkeypatch.delenv(WORKSPACE)
    with pytest.raises(BackendUnavailable, match="CUDA has already been initialised"):
        backend.open(0, threads=None, deterministic=True)


def test_the_peak_rises_and_can_be_reset(backend: CudaBackend, device: torch.device) -> None:
    backend.memory.reset_peak()
    before = backend.memory.peak_bytes()
    block = torch.empty(64 * 2**20, dtype=torch.uint8, device=device)
    assert backend.memory.peak_bytes() >= before + block.numel()
    del block
    backend.memory.reset_peak()
    assert backend.memory.peak_bytes() < before + 64 * 2**20
    assert backend.memory.total_bytes() > 2**30


def test_random_states_return(backend: CudaBackend, device: torch.device) -> None:
    backend.rng.seed(7)
    state = backend.rng.state()
    assert all(s.device.type == "cpu" and s.dtype == torch.uint8 for s in state.values())
    first = torch.rand(5), torch.rand(5, device=device)
    backend.rng.load_state(state)
    again = torch.rand(5), torch.rand(5, device=device)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_state_from_other_hardware_seeds_the_device(backend: CudaBackend, device: torch.device) -> None:
    backend.rng.seed(7)
    elsewhere = {"host": backend.rng.state()["host"]}
    expected = torch.rand(5, device=device)
    backend.rng.seed(8)
    backend.rng.load_state(elsewhere)
    assert torch.equal(torch.rand(5, device=device), expected)


def test_precision_and_peak_agree(backend: CudaBackend, device: torch.device) -> None:
    caps = backend.precision
    assert caps.default in caps.compute
    assert set(backend.peak_flops) in (set(), set(caps.compute))


def test_the_optimizer_is_fused(backend: CudaBackend, device: torch.device) -> None:
    weight = torch.nn.Parameter(torch.randn(8, device=device))
    optimizer = backend.build_optimizer(
        [{"params": [weight], "lr": 0.1, "weight_decay": 0.0}], betas=(0.9, 0.99), eps=1e-8
    )
    weight.grad = torch.ones_like(weight)
    before = weight.detach().clone()
    optimizer.step()
    backend.synchronize()
    # Adam's first step is lr · sign(gradient), up to eps.
    torch.testing.assert_close(weight.detach(), before - 0.1)
