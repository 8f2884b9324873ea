"""Pipelines: each step's loss, gradient norm and weights are those of one process."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from llava_core.data.batch import Batch, Labelled
from llava_core.data.packing import filler_batch, lengthened
from llava_core.engine.context import share_sequences
from llava_core.engine.layout import Layout
from llava_core.engine.loss import LossMode
from llava_core.engine.mesh import Mesh
from llava_core.engine.pipeline import num_micro_batches
from llava_core.engine.processes import Processes
from llava_core.engine.tensor import shard_tensors
from llava_core.model.stage import Stage
from llava_core.testing.models import tiny_text_config
from tests.distributed.processes import run_processes
from tests.unit.engine.support import FULL, batches, engine, examples, hf_model

STEPS = 4
TOLERANCE = 1e-5
"""Relative, of loss and gradient norm in fp32: the same terms in another order, through four updates by Adam, which
divides by what it sums."""

NUM_LAYERS = 4
NUM_TOKENS = 120
"""Of each micro-batch; more than any of the step's samples fill."""


@dataclass(frozen=True)
class Case:
    """A layout with a pipeline, the layers of its stages, and what is trained."""

    layout: Layout
    stage_layers: tuple[int, ...] = (2, 2)
    loss: LossMode = "token_mean"
    trainable: tuple[str, ...] = ("projector", "language")
    recompute: bool = False
    dtype: torch.dtype = torch.float32


CASES = {
    "two_stages": Case(Layout(pipeline=2)),
    "uneven": Case(Layout(pipeline=2), stage_layers=(1, 3)),
    "four_stages": Case(Layout(pipeline=4), stage_layers=(1, 1, 1, 1)),
    "interleaved": Case(Layout(pipeline=2), stage_layers=(1, 1, 1, 1)),
    "stage_1": Case(Layout(pipeline=2), trainable=("projector",)),
    "everything": Case(Layout(pipeline=2), trainable=("vision", "projector", "language")),
    "micro_batch_mean": Case(Layout(pipeline=2), loss="micro_batch_mean"),
    "sequence_mean": Case(Layout(pipeline=2), loss="sequence_mean"),
    "recompute": Case(Layout(pipeline=2), recompute=True),
    "with_shards": Case(Layout(pipeline=2, shard=2)),
    "with_replicas": Case(Layout(pipeline=2, replicate=2)),
    "interleaved_with_shards": Case(Layout(pipeline=2, shard=2), stage_layers=(1, 1, 1, 1)),
    "with_tensor": Case(Layout(pipeline=2, tensor=2)),
    "with_context": Case(Layout(pipeline=2, context=2)),
    "interleaved_with_context": Case(Layout(pipeline=2, context=2), stage_layers=(1, 1, 1, 1)),
    "with_all": Case(Layout(pipeline=2, shard=2, context=2, tensor=2)),
}


def stages_of(case: Case) -> list[Stage]:
    bounds = [sum(case.stage_layers[:i]) for i in range(len(case.stage_layers) + 1)]
    return [Stage(range(a, b), NUM_LAYERS) for a, b in pairwise(bounds)]


def step_batches(number: int, spec: Any) -> list[Batch]:
    """Four micro-batches, the last of text alone; of the last step, one."""
    samples = examples(spec, seed=number)
    return batches(samples, [2, 1, 2, 3]) if number < STEPS - 1 else batches(samples[:2], [2])


def share(whole: list[Batch], mesh: Mesh, *, interleaved: bool) -> list[Batch]:
    """This process's micro-batches of one size, and fillers."""
    own = whole[mesh.data_index :: mesh.layout.data]
    most = num_micro_batches(-(-len(whole) // mesh.layout.data), mesh.layout.pipeline, interleaved=interleaved)
    return [lengthened(batch, NUM_TOKENS, 0) for batch in own + [filler_batch(0, 24)] * (most - len(own))]


def spread(model: Any, mesh: Mesh) -> None:
    if mesh.layout.context > 1:
        share_sequences(model, mesh.devices["cp"])
    if mesh.layout.tensor > 1:
        shard_tensors(model, mesh.devices["tp"], sequence=True)


def train(case: Case, mesh: Mesh | None) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """Loss and gradient norm of each step, and what this process's trained weights became."""
    model, spec = hf_model(text=tiny_text_config(num_hidden_layers=NUM_LAYERS))
    build = partial(engine, model, spec, trainable=case.trainable, loss=case.loss, dtype=case.dtype)
    if mesh is None:
        trained = build()
    else:
        stages = mesh.own_stages(stages_of(case))
        trained = build(
            mesh=mesh, sharding=FULL, stages=stages, num_tokens=NUM_TOKENS, arrange=partial(spread, mesh=mesh)
        )
    for stage in trained.stages:
        stage.language_model.model.recompute = case.recompute
    results = []
    for number in range(STEPS):
        whole = step_batches(number, spec)
        own = whole if mesh is None else share(whole, mesh, interleaved=len(trained.stages) > 1)
        result = trained.step(own, 1.0, Labelled.of(whole))
        results.append((result.loss, result.grad_norm))
    return results, {name: full(p) for name, p in trained.trained.items()}


def full(parameter: Tensor) -> Tensor:
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach().clone()


def train_in_parallel(case: Case) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    rank, size = distributed.get_rank(), distributed.get_world_size()
    return train(case, Mesh.build(Processes(rank, size, rank, size), case.layout, "cpu"))


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_one_process(name: str) -> None:
    case = CASES[name]
    expected, expected_weights = train(case, None)
    found = run_processes(case.layout.world_size, train_in_parallel, case)
    for results, _ in found:
        for (loss, norm), (expected_loss, expected_norm) in zip(results, expected, strict=True):
            assert loss == pytest.approx(expected_loss, rel=TOLERANCE)
            assert norm == pytest.approx(expected_norm, rel=TOLERANCE)
    weights = {name: weight for _, trained in found for name, weight in trained.items()}
    assert weights.keys() == expected_weights.keys()
    # AdamW moves a weight by at most the learning rate a step, in a direction that noise decides where a gradient is
    # next to nothing; all but those agree.
    off = torch.cat([(weights[k] - v).abs().flatten() for k, v in expected_weights.items()])
    assert float(off.max()) <= 2e-3 * STEPS
    assert float((off > 1e-6).float().mean()) < 1e-3
