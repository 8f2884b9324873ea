"""Devices, memory, streams, random numbers and dtypes, as torch_npu shows them."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch as safetensors
import torch
import torch_npu
from ascend_simulator import is_simulated
from ascend_simulator.contract import ContractError
from torch import nn
from torch.utils.checkpoint import checkpoint

MIB = 1 << 20


def test_a_program_can_tell_that_it_is_simulated() -> None:
    assert is_simulated()


def test_torch_names_the_device() -> None:
    assert torch.accelerator.current_accelerator() == torch.device("npu")
    assert torch.npu.get_device_name(0) == "Ascend910B2"


@pytest.mark.parametrize(("visible", "count"), [("0,1", 2), ("1", 1), ("1,0", 0), ("0,0", 0), ("2", 0), ("0;1", 0)])
def test_visible_devices_must_exist_and_ascend(visible: str, count: int) -> None:
    environment = {**os.environ, "ASCEND_SIMULATOR_DEVICES": "2", "ASCEND_RT_VISIBLE_DEVICES": visible}
    program = "import torch; print(torch.npu.device_count())"
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert int(found.stdout) == count


def test_memory_statistics_rise_and_fall() -> None:
    gc.collect()
    before = torch.npu.memory_allocated()
    held = torch.empty(8 * MIB, dtype=torch.uint8, device="npu")
    assert torch.npu.memory_allocated() - before >= 8 * MIB
    assert torch.npu.max_memory_allocated() >= torch.npu.memory_allocated()
    del held
    assert torch.npu.memory_allocated() == before
    torch.npu.empty_cache()
    torch.npu.reset_peak_memory_stats()
    assert torch.npu.max_memory_allocated() == before


def test_the_device_has_less_memory_free_by_what_is_reserved() -> None:
    torch.npu.empty_cache()
    free, total = torch.npu.mem_get_info()
    held = torch.empty(64 * MIB, dtype=torch.uint8, device="npu")
    assert free - torch.npu.mem_get_info()[0] >= 64 * MIB
    assert torch.npu.mem_get_info()[1] == total
    del held
    torch.npu.empty_cache()
    assert torch.npu.mem_get_info() == (free, total)


def test_more_memory_than_there_is_raises_torchs_error() -> None:
    _, total = torch.npu.mem_get_info()
    with pytest.raises(torch.OutOfMemoryError, match="NPU out of memory"):
        torch.empty(total + MIB, dtype=torch.uint8, device="npu")
    assert torch.ones(2, device="npu").sum().item() == 2


def test_streams_and_events() -> None:
    stream, start, end = torch.npu.Stream(), *(torch.npu.Event(enable_timing=True) for _ in range(2))
    start.record()
    with torch.npu.stream(stream):
        assert torch.npu.current_stream() == stream
        doubled = torch.ones(4, device="npu") * 2
        end.record(stream)
    torch.npu.current_stream().wait_event(end)
    doubled.record_stream(torch.npu.current_stream())
    end.synchronize()
    assert end.query()
    assert start.elapsed_time(end) > 0
    stream.synchronize()
    torch.npu.synchronize()
    assert doubled.tolist() == [2.0] * 4


def test_copies_from_page_locked_memory() -> None:
    pinned = torch.arange(4.0).pin_memory()
    assert pinned.is_pinned()
    assert pinned.to("npu", non_blocking=True).cpu().tolist() == [0.0, 1.0, 2.0, 3.0]


def test_random_numbers_follow_the_devices_seed_and_state() -> None:
    torch.manual_seed(3)
    first, state, second = torch.randn(4, device="npu"), torch.npu.get_rng_state(), torch.rand(4, device="npu")
    torch.npu.set_rng_state(state)
    assert torch.equal(second, torch.rand(4, device="npu"))
    torch.manual_seed(3)
    assert torch.equal(first, torch.randn(4, device="npu"))
    assert not torch.equal(first, torch.randn(4, device="npu"))


def test_the_hosts_random_numbers_do_not_depend_on_the_device() -> None:
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    torch.randn(4, device="npu")
    assert torch.equal(torch.randn(4), expected)


def test_a_generator_of_the_device() -> None:
    generator = torch.Generator("npu").manual_seed(5)
    first = torch.randn(4, device="npu", generator=generator)
    assert torch.equal(first, torch.randn(4, device="npu", generator=generator.manual_seed(5)))


def test_recomputed_dropout_drops_the_same() -> None:
    x = torch.randn(64, device="npu", requires_grad=True)
    y = checkpoint(lambda x: nn.functional.dropout(x * 2, 0.5), x, use_reentrant=False)
    y.sum().backward()
    assert torch.equal(y != 0, x.grad != 0)


@pytest.mark.parametrize("op", [torch.exp, lambda x: x @ x, lambda x: x + x, lambda x: x.softmax(-1), torch.randn_like])
def test_float64_is_stored_but_not_computed_in(op: object) -> None:
    x = torch.ones(2, 2, dtype=torch.float64).npu()
    assert x.cpu().dtype == torch.float64
    assert "1., 1." in str(x)
    with pytest.raises(ContractError, match="float64"):
        op(x)  # type: ignore[operator]


def test_an_op_without_a_stand_in_fails_by_name() -> None:
    with pytest.raises(RuntimeError, match="MoeTokenPermute"):
        torch_npu.npu_moe_token_permute(torch.randn(4, 8).npu(), torch.zeros(4, 2, dtype=torch.int64).npu())


@pytest.mark.parametrize(
    ("left", "right"),
    [((3,), (3,)), ((2, 3), (3,)), ((3,), (3, 2)), ((2, 4, 3), (3, 5)), ((2, 4, 3), (2, 3, 5)), ((4, 3), (2, 3, 5))],
)
def test_matmul_gradients(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    host = [torch.randn(shape, requires_grad=True) for shape in (left, right)]
    device = [x.detach().npu().requires_grad_() for x in host]
    expected, actual = host[0] @ host[1], device[0] @ device[1]
    direction = torch.randn_like(expected)
    expected.backward(direction)
    actual.backward(direction.npu())
    torch.testing.assert_close([x.grad.cpu() for x in device], [x.grad for x in host])


def test_scaled_dot_product_attention_has_gradients() -> None:
    host = [torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3)]
    device = [x.detach().npu().requires_grad_() for x in host]
    for inputs in (host, device):
        nn.functional.scaled_dot_product_attention(*inputs, is_causal=True).square().sum().backward()
    torch.testing.assert_close([x.grad.cpu() for x in device], [x.grad for x in host])


def test_tensors_are_saved_and_loaded(tmp_path: Path) -> None:
    state = nn.Linear(3, 2).npu().state_dict()
    torch.save(state, tmp_path / "state.pt")
    safetensors.save_file(state, tmp_path / "state.safetensors")
    loads = [torch.load(tmp_path / "state.pt"), safetensors.load_file(tmp_path / "state.safetensors", device="npu:0")]
    for loaded in loads:
        assert loaded["weight"].device == torch.device("npu:0")
        torch.testing.assert_close(loaded, state)
    assert torch.load(tmp_path / "state.pt", map_location="cpu")["weight"].device.type == "cpu"


def test_determinism_can_be_asked_for() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        weight = torch.ones(4, 2, device="npu", requires_grad=True)
        nn.functional.embedding(torch.tensor([1, 1, 3]).npu(), weight).sum().backward()
        assert weight.grad[:, 0].tolist() == [0.0, 2.0, 0.0, 1.0]
    finally:
        torch.use_deterministic_algorithms(False)


def test_compile_modes_can_be_chosen() -> None:
    assert torch.npu.is_jit_compile_false()
    torch.npu.set_compile_mode(jit_compile=True)
    try:
        # torch_npu then casts convolutions' weights into a format of the device.
        assert not torch.npu.is_jit_compile_false()
        assert nn.Conv2d(3, 8, 4).npu()(torch.ones(1, 3, 4, 4).npu()).shape == (1, 8, 1, 1)
    finally:
        torch.npu.set_compile_mode(jit_compile=False)


def test_layers_of_a_vision_tower() -> None:
    torch.manual_seed(0)
    host = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(2), nn.LayerNorm(9), nn.GELU(), nn.Linear(9, 2))
    device = copy.deepcopy(host).npu()
    images = torch.randn(2, 3, 12, 12)
    for model, x in ((host, images), (device, images.npu())):
        model(x).square().sum().backward()
    torch.testing.assert_close([x.grad.cpu() for x in device.parameters()], [x.grad for x in host.parameters()])


def test_indexing_splices_rows() -> None:
    rows, where = torch.randn(3, 4), torch.tensor([5, 0, 2])
    expected = torch.zeros(6, 4).index_copy(0, where, rows)
    spliced = torch.zeros(6, 4).npu()
    spliced[where.npu()] = rows.npu()
    assert torch.equal(spliced.cpu(), expected)
    assert torch.equal(torch.zeros(6, 4).npu().index_copy(0, where.npu(), rows.npu()).cpu(), expected)
    assert torch.equal(spliced.index_select(0, where.npu()).cpu(), rows)


def test_autocast_is_told_its_dtype() -> None:
    layer = nn.Linear(4, 4).npu()
    with torch.autocast("npu", dtype=torch.bfloat16):
        assert layer(torch.ones(2, 4, device="npu")).dtype == torch.bfloat16
