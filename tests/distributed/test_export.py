"""Exports of models that are spread over processes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import distributed

from llava_core.data.templates import V1
from llava_core.engine.layout import Layout
from llava_core.engine.mesh import Mesh
from llava_core.engine.processes import Processes
from llava_core.errors import LlavaError
from llava_core.model.stage import Stage
from llava_core.train.agreement import agree
from llava_core.weights.export import export_model
from tests.distributed.processes import run_processes
from tests.hardware import hardware
from tests.unit.engine.support import engine
from tests.unit.inference.support import parts, processor, tokenizer

LAYOUTS = {
    "shard_2": Layout(shard=2),
    "replicate_2": Layout(replicate=2),
    "hybrid_2x2": Layout(replicate=2, shard=2),
    "pipeline_2": Layout(pipeline=2),
    "pipeline_2x2": Layout(pipeline=2, shard=2),
}


def export(layout: Layout, dtype: torch.dtype, folder: Path) -> None:
    source = parts("clip")
    process, mesh = Processes(), None
    if layout.world_size > 1:
        rank, size = distributed.get_rank(), distributed.get_world_size()
        process = Processes(rank, size, rank, size)
        mesh = Mesh.build(process, layout, hardware().device.type)
    num_layers = source.spec.text.num_layers
    halves = [Stage(range(num_layers // 2), num_layers), Stage(range(num_layers // 2, num_layers), num_layers)]
    stages = mesh.own_stages(halves) if mesh is not None and layout.pipeline > 1 else ()
    trained = engine(source.reference, source.spec, dtype=dtype, mesh=mesh, stages=stages)
    write = partial(export_model, trained.model, tokenizer(), processor("square"), V1, folder, dtype=dtype)
    weights = trained.pipeline.whole_weights() if trained.pipeline is not None else None
    agree(process, lambda: write(writes=process.is_first, weights=weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_it_is_that_of_one_process_byte_for_byte(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tokenizer()  # trained once, before the processes part
    run_processes(LAYOUTS[name].world_size, export, LAYOUTS[name], dtype, tmp_path / "spread")
    export(Layout(), dtype, tmp_path / "alone")
    files = sorted(file.name for file in (tmp_path / "alone").iterdir())
    assert sorted(file.name for file in (tmp_path / "spread").iterdir()) == files
    assert "model.safetensors" in files
    for file in files:
        assert (tmp_path / "spread" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes(), file


def refused_export(folder: Path) -> str:
    with pytest.raises(LlavaError) as caught:
        export(LAYOUTS["shard_2"], torch.float32, folder)
    return str(caught.value)


def test_an_error_where_it_is_written_leaves_no_process_waiting(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not an export")
    messages = run_processes(2, refused_export, tmp_path)
    assert all("is no export of llava-core" in message for message in messages)
    assert "process 0" in messages[1]
