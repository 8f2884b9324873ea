"""An engine on any layout, and a step's micro-batches as the processes of that layout take them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

from torch import Tensor, distributed

from llava_core.data.batch import Batch
from llava_core.data.packing import filler_batch, lengthened
from llava_core.engine.context import share_sequences
from llava_core.engine.layout import Layout
from llava_core.engine.mesh import Mesh
from llava_core.engine.pipeline import num_micro_batches
from llava_core.engine.processes import Processes
from llava_core.engine.recompute import Keeping, arrange_layers
from llava_core.engine.tensor import shard_tensors
from llava_core.engine.torch_engine import TorchEngine
from llava_core.model.llava import Llava
from llava_core.model.stage import Stage
from llava_core.testing.models import tiny_text_config
from llava_core.weights.shards import whole_tensor
from tests.hardware import hardware
from tests.unit.engine.support import engine, hf_model

NUM_LAYERS = 4
KEEP_ALL = Keeping()


def this_process() -> Processes:
    rank, size = distributed.get_rank(), distributed.get_world_size()
    return Processes(rank, size, rank, size)


def build_mesh(layout: Layout) -> Mesh | None:
    """None for one process."""
    return None if layout.world_size == 1 else Mesh.build(this_process(), layout, hardware().device.type)


def build_engine(
    mesh: Mesh | None,
    stage_layers: Sequence[int] = (),
    seed: int = 0,
    keeping: Keeping = KEEP_ALL,
    **options: Any,
) -> TorchEngine:
    """This process's part of the tiny LLaVA with NUM_LAYERS layers.

    Args:
        stage_layers: the layers of each stage; as many stages as processes of the pipeline, if not given.
        keeping: in the processes of a mesh.
        options: for `engine`.
    """
    model, spec = hf_model(seed, text=tiny_text_config(num_hidden_layers=NUM_LAYERS))
    if mesh is None:
        return engine(model, spec, **options)
    stages: Sequence[Stage] = ()
    if mesh.layout.pipeline > 1:
        counts = stage_layers or (NUM_LAYERS // mesh.layout.pipeline,) * mesh.layout.pipeline
        stages = mesh.own_stages([Stage(range(a, b), NUM_LAYERS) for a, b in pairwise((0, *accumulate(counts)))])
    spread = partial(share_work, mesh=mesh, keeping=keeping)
    return engine(model, spec, mesh=mesh, stages=stages, arrange=spread, **options)


def share_work(model: Llava, mesh: Mesh, keeping: Keeping) -> None:
    """Context and tensor parallelism, where the mesh has them, and then recomputation."""
    if mesh.layout.context > 1:
        share_sequences(model, mesh.devices["cp"])
    if mesh.layout.tensor > 1:
        shard_tensors(model, mesh.devices["tp"], sequence=True)
    arrange_layers(model, keeping)


def take_share(whole: list[Batch], trained: TorchEngine) -> list[Batch]:
    """This process's micro-batches, and fillers where another has more or the pipeline needs them."""
    if trained.mesh is None:
        return whole
    layout = trained.mesh.layout
    own, most = whole[trained.mesh.data_index :: layout.data], -(-len(whole) // layout.data)
    if layout.pipeline > 1:
        most = num_micro_batches(most, layout.pipeline, interleaved=len(trained.stages) > 1)
    filled = own + [filler_batch(0, 24)] * (most - len(own))
    if layout.pipeline == 1:
        return filled
    longest = max(batch.num_tokens for batch in filled)
    return [lengthened(batch, longest, 0) for batch in filled]


def whole_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gathered by torch, as a reference of its own."""
    return {name: whole_tensor(tensor.detach()).cpu().clone() for name, tensor in tensors.items()}
