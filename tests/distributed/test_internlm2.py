"""Processes that share an InternLM2 hold the parts of the Llama that it is, and write the folder that it came from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import distributed

from llava_core.backend import OpSet
from llava_core.data.templates import V1
from llava_core.engine.layout import Layout
from llava_core.engine.mesh import Mesh
from llava_core.engine.processes import Processes
from llava_core.engine.shard import Sharding, part_of, shard_data
from llava_core.engine.tensor import shard_tensors
from llava_core.model.llava import Llava
from llava_core.weights.export import export_model
from llava_core.weights.load import load_model
from llava_core.weights.source import from_folder
from llava_core.weights.tokenizer import load_tokenizer
from tests.distributed.processes import run_processes
from tests.unit.weights.internlm2_folder import llama, save_internlm2

LAYOUTS = {"shard_3": Layout(shard=3), "tensor_2": Layout(tensor=2), "shard_2_tensor_2": Layout(shard=2, tensor=2)}


def load_and_export(layout: Layout, folder: Path, out: Path) -> None:
    rank, size = distributed.get_rank(), distributed.get_world_size()
    mesh = Mesh.build(Processes(rank, size, rank, size), layout, "cpu")

    def arrange(model: Llava) -> None:
        if layout.tensor > 1:
            shard_tensors(model, mesh.devices["tp"], sequence=False)
        shard_data(model, mesh, Sharding(keep_weights=False, reduce_dtype=torch.float32))

    source = from_folder(folder)
    options = {"compute_dtype": torch.float32, "device": torch.device("cpu"), "trainable": frozenset({"language"})}
    model = load_model(source, OpSet.of({}), **options, arrange=arrange, part_of=part_of)
    parameters = {f"language_model.{name}": parameter for name, parameter in llama().named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.full_tensor(), parameters[name]), name
    tokenizer = load_tokenizer(folder)
    export_model(model, tokenizer, None, V1, out, dtype=torch.float32, remote=source.remote, writes=rank == 0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_reads_its_part_and_the_export_is_the_folder(name: str, tmp_path: Path) -> None:
    folder = save_internlm2(llama(), tmp_path / "internlm2")
    run_processes(LAYOUTS[name].world_size, load_and_export, LAYOUTS[name], folder, tmp_path / "out")
    written, found = (from_folder(path).tensors for path in (tmp_path / "out", folder))
    assert written.keys() == found.keys()
    for tensor in found:
        assert torch.equal(written[tensor]()[(slice(None),)], found[tensor]()[(slice(None),)]), tensor
