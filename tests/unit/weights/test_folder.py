"""Folders of tensors: which files count, and what damaged ones say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llava_core.errors import WeightsError
from llava_core.weights.folder import WeightsFolder, weight_files

TENSORS = {"a": torch.arange(4.0), "b": torch.ones(2, 3), "c": torch.zeros(5)}


def write_shards(folder: Path, index_name: str = "model.safetensors.index.json") -> None:
    """`a` and `b` in the first file, `c` in the second, and an index."""
    suffix = index_name.split(".")[1]
    weight_map = {}
    for number, names in ((1, "ab"), (2, "c")):
        file = folder / f"{index_name.split('.')[0]}-0000{number}-of-00002.{suffix}"
        shard = {name: TENSORS[name] for name in names}
        if suffix == "safetensors":
            save_file(shard, file)
        else:
            torch.save(shard, file)
        weight_map |= dict.fromkeys(names, file.name)
    (folder / index_name).write_text(json.dumps({"metadata": {"total_size": 60}, "weight_map": weight_map}))


def assert_complete(folder: WeightsFolder) -> None:
    assert set(folder) == set(TENSORS)
    assert len(folder) == len(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(folder[name], tensor)


def test_one_safetensors_file(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert_complete(WeightsFolder(tmp_path))


def test_a_file_itself(tmp_path):
    save_file(TENSORS, tmp_path / "any.safetensors")
    assert_complete(WeightsFolder(tmp_path / "any.safetensors"))


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_shards(tmp_path, index):
    write_shards(tmp_path, index)
    assert_complete(WeightsFolder(tmp_path))


def test_only_the_files_of_the_index_count(tmp_path):
    write_shards(tmp_path)
    save_file({"other": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    assert_complete(WeightsFolder(tmp_path))


def test_safetensors_go_before_bin(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    torch.save({"other": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert_complete(WeightsFolder(tmp_path))


def test_the_usual_name_goes_before_other_formats(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    save_file({"visual.proj": torch.zeros(1)}, tmp_path / "open_clip_model.safetensors")
    assert_complete(WeightsFolder(tmp_path))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "mm_projector.bin"])
@pytest.mark.parametrize("archive", [True, False], ids=["zip", "before torch 1.6"])
def test_bin_file(tmp_path, name, archive):
    torch.save(TENSORS, tmp_path / name, _use_new_zipfile_serialization=archive)
    assert_complete(WeightsFolder(tmp_path))


def test_pytorch_model_goes_before_other_bin_files(tmp_path):
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    torch.save({"lr": torch.zeros(1)}, tmp_path / "training_args.bin")
    assert_complete(WeightsFolder(tmp_path))


class Payload:
    """What a hostile pickle does when it is loaded."""

    ran = False

    def __reduce__(self):
        return setattr, (Payload, "ran", True)


def test_code_in_a_bin_file_does_not_run(tmp_path):
    torch.save({"a": Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin cannot be read as weights"):
        WeightsFolder(tmp_path)
    assert not Payload.ran


@pytest.mark.parametrize("keep", [0, 4, 60, -4])
def test_truncated_safetensors(tmp_path, keep):
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(WeightsError, match=r"model\.safetensors cannot be read as weights: .*download complete"):
        WeightsFolder(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 200, -4])
def test_truncated_bin(tmp_path, keep):
    file = tmp_path / "pytorch_model.bin"
    torch.save(TENSORS, file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin cannot be read as weights: .*download complete"):
        WeightsFolder(tmp_path)


def test_truncated_shard_is_named(tmp_path):
    write_shards(tmp_path)
    file = tmp_path / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(WeightsError, match=r"model-00002-of-00002\.safetensors cannot be read"):
        WeightsFolder(tmp_path)


def test_missing_shard_is_named(tmp_path):
    write_shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"not there: \['model-00002-of-00002\.safetensors'\]"):
        WeightsFolder(tmp_path)


@pytest.mark.parametrize("text", ["", '{"weight_map": {"a"', "{}", "[]", '{"weight_map": []}'])
def test_damaged_index(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WeightsError, match=r"model\.safetensors\.index\.json is no index of weights"):
        weight_files(tmp_path)


def test_one_name_in_two_files(tmp_path):
    for name in ("first.safetensors", "second.safetensors"):
        save_file(TENSORS, tmp_path / name)
    with pytest.raises(WeightsError, match=r"'a' is in both first\.safetensors and second\.safetensors"):
        WeightsFolder(tmp_path)


def test_folder_without_weights_says_what_it_has(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"no \*\.safetensors and no \*\.bin file; it has: \['config\.json'\]"):
        WeightsFolder(tmp_path)


def test_no_such_folder(tmp_path):
    with pytest.raises(WeightsError, match="no such folder: .*/nowhere"):
        WeightsFolder(tmp_path / "nowhere")


def test_unknown_tensor(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    with pytest.raises(KeyError):
        WeightsFolder(tmp_path)["nothing"]


@pytest.mark.parametrize(("held", "said"), [([torch.ones(1)], "holds a list"), ({"a": 3}, "'a' is a int")])
def test_a_bin_file_of_something_else(tmp_path, held, said):
    torch.save(held, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=rf"pytorch_model\.bin.*{said}; expected"):
        WeightsFolder(tmp_path)
