"""What a state checkpoint keeps, refuses and removes. Damage and crashes are in tests/faults."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from llava_core.engine.parts import local_parts
from llava_core.errors import CheckpointError
from llava_core.train import manifest
from llava_core.train.checkpoint import JSON, open_checkpoint, open_newest, save_state
from llava_core.train.tensor_files import DTYPE_NAMES
from tests.hardware import hardware
from tests.unit.train.support import whole_tensors

DTYPES = sorted(DTYPE_NAMES, key=str)


def assert_same(loaded: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal names, shapes, dtypes and bits: a NaN or a negative zero that changed its bits is a difference."""
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape), name
        flat = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (loaded[name], tensor))
        assert torch.equal(*flat), name


def names(root: Path) -> list[str]:
    return sorted(os.listdir(root))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_shape_returns_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    # Random bits hold NaNs with payloads, infinities and subnormals; a bool has only two valid patterns.
    high = 2 if dtype is torch.bool else 256
    bits = torch.randint(0, high, (24 * dtype.itemsize,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    matrix = bits.view(dtype).reshape(4, 6)
    tensors = {
        "matrix": matrix,
        "transposed": matrix.t(),
        "strided": matrix[::2, 1::2],
        "column": matrix[:, 2],
        "expanded": matrix[:, :1].expand(4, 3),
        "scalar": matrix[1, 2],
        "empty": matrix[:0],
        "empty middle": torch.empty(3, 0, 2, dtype=dtype),
    }
    assert_same(whole_tensors(open_checkpoint(save_state(tmp_path, 1, local_parts(tensors), {}, keep=None))), tensors)


@pytest.mark.device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8], ids=str)
def test_tensors_on_a_device_return_to_the_host_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    matrix = torch.randint(0, 256, (4, 6 * dtype.itemsize), dtype=torch.uint8).view(dtype)
    there = matrix.to(hardware().device)
    saved = {"matrix": there, "transposed": there.t(), "column": there[:, 2], "empty": there[:0]}
    loaded = whole_tensors(open_checkpoint(save_state(tmp_path, 1, local_parts(saved), {}, keep=None)))
    assert {tensor.device.type for tensor in loaded.values()} == {"cpu"}
    expected = {"matrix": matrix, "transposed": matrix.t(), "column": matrix[:, 2], "empty": matrix[:0]}
    assert_same(loaded, expected)


def test_mixed_dtypes_of_odd_sizes_share_a_file(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.ones(3).to(dtype) for dtype in DTYPES}
    path = save_state(tmp_path, 1, local_parts(tensors), {}, keep=None)
    assert names(path) == ["manifest.json", "state.json", "tensors-00000-00001.safetensors"]
    assert_same(whole_tensors(open_checkpoint(path)), tensors)
    # A reader that maps the file can then view each tensor in place.
    data = (path / "tensors-00000-00001.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8:start]).items():
        assert (start + entry["data_offsets"][0]) % tensors[name].element_size() == 0, name


def test_the_safetensors_library_maps_the_files(tmp_path: Path) -> None:
    tensors = {"é/weight": torch.randn(3, 5).bfloat16(), "step": torch.tensor(7), "mask": torch.tensor([True, False])}
    path = save_state(tmp_path, 1, local_parts(tensors), {}, keep=None)
    with safe_open(path / "tensors-00000-00001.safetensors", framework="pt") as file:
        assert_same({name: file.get_tensor(name) for name in file.keys()}, tensors)  # noqa: SIM118


def test_shared_storage_returns_as_independent_copies(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    tensors = {"embed": weight, "head": weight, "row": weight[1], "overlap": weight.view(-1)[2:5]}
    loaded = whole_tensors(open_checkpoint(save_state(tmp_path, 1, local_parts(tensors), {}, keep=None)))
    assert_same(loaded, tensors)
    loaded["embed"].zero_()
    assert loaded["head"].sum() == 15
    assert loaded["row"].sum() == 12


def test_nothing_loaded_depends_on_the_files(tmp_path: Path) -> None:
    path = save_state(tmp_path, 1, local_parts({"a": torch.arange(1000)}), {}, keep=None)
    loaded = whole_tensors(open_checkpoint(path))["a"]
    with open(path / "tensors-00000-00001.safetensors", "r+b") as file:
        file.write(b"\xff" * 5000)
    assert torch.equal(loaded, torch.arange(1000))


def test_state_returns_equal(tmp_path: Path) -> None:
    state: dict[str, JSON] = {
        "rng": [2**63, -1],
        "lr": 0.1 + 0.2,
        "tiny": 5e-324,
        "text": 'é\n"\u2028',
        "none": None,
        "flags": {"": [True]},
    }
    loaded = open_checkpoint(save_state(tmp_path, 12, {}, state, keep=None))
    assert (loaded.step, loaded.tensors, loaded.state) == (12, {}, state)


def test_tensors_split_at_the_size_limit(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(5)} | {"big": torch.zeros(100)}
    path = save_state(tmp_path, 1, local_parts(tensors), {}, keep=None, max_file_bytes=80)
    shards = sorted(path.glob("*.safetensors"))
    assert [shard.name for shard in shards] == [f"tensors-00000-{i:05d}.safetensors" for i in range(1, 5)]
    sizes = []
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            sizes.append(sum(file.get_tensor(name).nbytes for name in file.keys()))  # noqa: SIM118
    # The tensor above the limit has a file of its own; the others go two a file.
    assert sizes == [400, 80, 80, 40]
    assert_same(whole_tensors(open_checkpoint(path)), tensors)


def test_equal_input_makes_equal_files(tmp_path: Path) -> None:
    tensors = {name: torch.ones(3) for name in "bca"}
    one = save_state(tmp_path / "one", 1, local_parts(tensors), {"a": 1}, keep=None)
    two = save_state(tmp_path / "two", 1, local_parts(dict(reversed(tensors.items()))), {"a": 1}, keep=None)
    assert [(p.name, p.read_bytes()) for p in sorted(one.iterdir())] == [
        (p.name, p.read_bytes()) for p in sorted(two.iterdir())
    ]


def test_manifest_is_plain_json(tmp_path: Path) -> None:
    path = save_state(tmp_path, 5, local_parts({"a": torch.ones(3)}), {}, keep=None)
    manifest = json.loads((path / "manifest.json").read_text())["manifest"]
    assert (manifest["format"], manifest["step"]) == (2, 5)
    assert {name: entry["size"] for name, entry in manifest["files"].items()} == {
        p.name: p.stat().st_size for p in path.iterdir() if p.name != "manifest.json"
    }


class Sharded(torch.Tensor):
    """A stand-in for tensors whose own memory is a part of their values."""


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("a", torch.ones(2, dtype=torch.complex64)),
        ("a", torch.ones(2, 2).to_sparse()),
        ("a", torch.ones(2, device="meta")),
        ("a", torch.ones(2).as_subclass(Sharded)),
        ("__metadata__", torch.ones(2)),
        ("\ud800", torch.ones(2)),
    ],
    ids=["dtype", "sparse", "meta", "subclass", "reserved name", "name without UTF-8"],
)
def test_tensor_that_cannot_be_stored_is_refused_before_writing(
    tmp_path: Path, name: str, tensor: torch.Tensor
) -> None:
    with pytest.raises(ValueError, match="cannot be stored|surrogates"):
        save_state(tmp_path, 1, local_parts({"fine": torch.ones(1), name: tensor}), {}, keep=None)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "value", [(1, 2), {1: 2}, float("nan"), float("inf"), torch.ones(1), Path("x"), b"x", {"a": [(1,)]}], ids=repr
)
def test_state_that_json_would_change_is_refused_before_writing(tmp_path: Path, value: object) -> None:
    with pytest.raises(ValueError, match="not JSON|does not survive JSON"):
        save_state(tmp_path, 1, {}, {"key": value}, keep=None)  # type: ignore[dict-item]
    assert names(tmp_path) == []


@pytest.mark.parametrize(("step", "keep"), [(-1, None), (1, 0)])
def test_bad_arguments_are_refused(tmp_path: Path, step: int, keep: int | None) -> None:
    with pytest.raises(ValueError, match="step must be at least 0, keep at least 1"):
        save_state(tmp_path, step, {}, {}, keep=keep)


def test_keep_counts_only_up_to_the_saved_step(tmp_path: Path) -> None:
    for step in (10, 20, 30, 90):
        save_state(tmp_path, step, {}, {}, keep=None)
    save_state(tmp_path, 40, {}, {}, keep=2)
    assert names(tmp_path) == ["step-00000030", "step-00000040", "step-00000090"]


def test_sound_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    save_state(tmp_path, 1, local_parts({"a": torch.zeros(2)}), {}, keep=None)
    with pytest.raises(CheckpointError, match="never overwritten"):
        save_state(tmp_path, 1, local_parts({"a": torch.ones(2)}), {}, keep=1)
    assert torch.equal(whole_tensors(open_checkpoint(tmp_path / "step-00000001"))["a"], torch.zeros(2))


def test_damaged_checkpoint_of_the_same_step_is_replaced_with_a_warning(tmp_path: Path) -> None:
    path = save_state(tmp_path, 1, local_parts({"a": torch.zeros(2)}), {}, keep=None)
    (path / "state.json").unlink()
    with pytest.warns(UserWarning, match=r"replacing a damaged checkpoint: .*state\.json"):
        save_state(tmp_path, 1, local_parts({"a": torch.ones(2)}), {}, keep=None)
    assert torch.equal(whole_tensors(open_checkpoint(path))["a"], torch.ones(2))
    assert names(tmp_path) == ["step-00000001"]


def test_newest_goes_by_number_and_ignores_other_names(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "run"
    assert open_newest(root) == (None, [])
    for step in (99_999_999, 100_000_000, 3):
        save_state(root, step, {}, {"step": step}, keep=None)
    for name in ("step-200000000.partial", "step-200000000.deleting", "step-0200000000", "step-3", "best", "step-x"):
        (root / name).mkdir()
    state, skipped = open_newest(root)
    assert state is not None
    assert (state.step, state.state, skipped) == (100_000_000, {"step": 100_000_000}, [])


def test_save_leaves_foreign_names_alone(tmp_path: Path) -> None:
    for name in ("best", "step-3", "notes.partial", "step-00000009.bak"):
        (tmp_path / name).mkdir()
    save_state(tmp_path, 1, {}, {}, keep=1)
    assert names(tmp_path) == ["best", "notes.partial", "step-00000001", "step-00000009.bak", "step-3"]


@pytest.mark.parametrize("name", ["step-00000002", "step-00000001.partial", "good"])
def test_checkpoint_under_another_name_is_refused(tmp_path: Path, name: str) -> None:
    save_state(tmp_path, 1, {}, {}, keep=None).rename(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"belongs to step-00000001, not to a directory named {name}"):
        open_checkpoint(tmp_path / name)


def test_later_format_is_refused_by_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "FORMAT", 3)
        path = save_state(tmp_path, 1, {}, {}, keep=None)
    with pytest.raises(CheckpointError, match="has format 3; this version reads format 2"):
        open_checkpoint(path)


def test_absent_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="step-00000007"):
        open_checkpoint(tmp_path / "step-00000007")
