"""The cpu backend's device, memory, random state, threads and process group."""

from __future__ import annotations

import mmap
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed

from llava_core.backend import World
from llava_core.backend.host import available_cores
from llava_cpu import backend as module
from llava_cpu.backend import CpuBackend, given_threads, idle_cores


def test_it_is_always_available() -> None:
    probe = CpuBackend.probe()
    assert probe.available
    assert len(probe.devices) == 1


def test_open_sets_the_threads_it_is_told() -> None:
    device = CpuBackend().open(0, threads=1, deterministic=True)
    assert device == torch.device("cpu")
    assert torch.get_num_threads() == 1
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("load", "left"), [(0.0, 8), (2.9, 5), (7.8, 1), (40.0, 1)])
def test_threads_are_chosen_from_the_load(load: float, left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available_cores", lambda: 8)
    monkeypatch.setattr(module.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(module.os, "getloadavg", lambda: (load, 0.0, 0.0))
    assert idle_cores() == left


def test_a_share_of_a_machine_is_used_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available_cores", lambda: 4)
    monkeypatch.setattr(module.os, "cpu_count", lambda: 64)
    monkeypatch.setattr(module.os, "getloadavg", lambda: (60.0, 0.0, 0.0))
    assert idle_cores() == 4


def test_cores_are_those_the_process_may_use() -> None:
    assert 1 <= available_cores() <= (torch.multiprocessing.cpu_count() or 1)


def test_the_random_state_returns() -> None:
    rng = CpuBackend().rng
    rng.seed(3)
    state = rng.state()
    first = torch.rand(4)
    rng.load_state(state)
    assert torch.equal(torch.rand(4), first)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_the_peak_rises_with_use_and_falls_after_a_reset() -> None:
    memory = CpuBackend().memory
    memory.reset_peak()
    before = memory.peak_bytes()
    # Of the system: an allocator may have room for a tensor in what others gave back.
    with mmap.mmap(-1, 64 << 20) as block:
        block.write(bytes(64 << 20))
        assert memory.peak_bytes() - before >= 48 << 20
    memory.reset_peak()
    assert memory.peak_bytes() - before < 48 << 20


def test_its_process_group_sums(tmp_path: Path) -> None:
    spec = CpuBackend().dist
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group(spec.process_group, store=store, rank=0, world_size=1, timeout=timedelta(seconds=60))
    try:
        for dtype in spec.reduce_dtypes:
            value = torch.ones(3, dtype=dtype)
            distributed.all_reduce(value)
            assert torch.equal(value, torch.ones(3, dtype=dtype))
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize(("local_size", "share"), [(2, "4"), (3, "2"), (16, "1")])
def test_processes_of_one_machine_share_its_cores(local_size: int, share: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "idle_cores", lambda: 8)
    assert CpuBackend.launch_env(World(local_size), {}) == {"OMP_NUM_THREADS": share}


def test_a_process_alone_and_a_user_who_chose_are_left_alone() -> None:
    assert CpuBackend.launch_env(World(1), {}) == {}
    assert CpuBackend.launch_env(World(4), {"OMP_NUM_THREADS": "3"}) == {}


@pytest.mark.parametrize(("text", "threads"), [("3", 3), ("3,1", 3), ("0", None), ("many", None)])
def test_the_environment_says_how_many_threads(text: str, threads: int | None) -> None:
    assert given_threads({"OMP_NUM_THREADS": text}) == threads


def test_open_keeps_to_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(module, "idle_cores", lambda: 2)
    CpuBackend().open(0, threads=None, deterministic=False)
    assert torch.get_num_threads() == 1
