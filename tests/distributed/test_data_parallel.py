"""Data parallel in every form: each step's loss and gradient norm are those of one process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from llava_core.data.batch import Batch, Labelled
from llava_core.data.packing import filler_batch
from llava_core.engine.layout import Layout
from llava_core.engine.loss import LossMode
from llava_core.engine.mesh import Mesh
from llava_core.engine.processes import Processes
from llava_core.engine.recompute import Keeping, Recompute, arrange_layers
from llava_core.engine.shard import Sharding
from llava_core.errors import TrainingError
from tests.distributed.processes import run_processes
from tests.unit.engine.support import batches, engine, examples, hf_model

STEPS = 4
TOLERANCE = 1e-5
"""Relative, of loss and gradient norm in fp32: the same terms in another order, through four updates by Adam, which
divides by what it sums. Measured 6e-7."""


@dataclass(frozen=True)
class Case:
    """A form of data parallelism and what is trained."""

    layout: Layout
    keep_weights: bool = False
    loss: LossMode = "token_mean"
    trainable: tuple[str, ...] = ("projector", "language")
    recompute: Recompute = "none"


CASES = {
    "full": Case(Layout(shard=2)),
    "grad": Case(Layout(shard=2), keep_weights=True),
    "replicate": Case(Layout(replicate=2), keep_weights=True),
    "hybrid": Case(Layout(replicate=2, shard=2)),
    "hybrid_grad": Case(Layout(replicate=2, shard=2), keep_weights=True),
    "stage_1": Case(Layout(shard=2), trainable=("projector",)),
    "everything": Case(Layout(shard=2), trainable=("vision", "projector", "language")),
    "sequence_mean": Case(Layout(shard=2), loss="sequence_mean"),
    "micro_batch_mean": Case(Layout(replicate=2), loss="micro_batch_mean"),
    "selective": Case(Layout(shard=2), recompute="selective"),
    "recompute": Case(Layout(shard=2), recompute="full"),
}


def step_batches(number: int, spec: Any) -> list[Batch]:
    """Four micro-batches, the last of text alone; of the last step, one."""
    samples = examples(spec, seed=number)
    return batches(samples, [2, 1, 2, 3]) if number < STEPS - 1 else batches(samples[:2], [2])


def train(case: Case, mesh: Mesh | None) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """Loss and gradient norm of each step, and what the trained weights became."""
    model, spec = hf_model()
    sharding = Sharding(case.keep_weights, torch.float32)
    trained = engine(model, spec, trainable=case.trainable, loss=case.loss, mesh=mesh, sharding=sharding)
    arrange_layers(trained.model, Keeping(case.recompute))
    results = []
    for number in range(STEPS):
        whole = step_batches(number, spec)
        own = whole if mesh is None else share(whole, mesh)
        result = trained.step(own, 1.0, Labelled.of(whole))
        results.append((result.loss, result.grad_norm))
    return results, {name: full(p) for name, p in trained.trained.items()}


def share(whole: list[Batch], mesh: Mesh) -> list[Batch]:
    """This process's micro-batches, and a filler where another has one more."""
    own = whole[mesh.data_index :: mesh.layout.data]
    most = -(-len(whole) // mesh.layout.data)
    return own + [filler_batch(0, 24)] * (most - len(own))


def full(parameter: Tensor) -> Tensor:
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach().clone()


def train_in_parallel(case: Case) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    rank, size = distributed.get_rank(), distributed.get_world_size()
    return train(case, Mesh.build(Processes(rank, size, rank, size), case.layout, "cpu"))


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_one_process(name: str) -> None:
    case = CASES[name]
    expected, expected_weights = train(case, None)
    for found, weights in run_processes(case.layout.world_size, train_in_parallel, case):
        for (loss, norm), (expected_loss, expected_norm) in zip(found, expected, strict=True):
            assert loss == pytest.approx(expected_loss, rel=TOLERANCE)
            assert norm == pytest.approx(expected_norm, rel=TOLERANCE)
        assert weights.keys() == expected_weights.keys()
        # AdamW moves a weight by at most the learning rate a step, in a direction that noise decides where a gradient
        # is next to nothing; all but those agree.
        off = torch.cat([(weights[k] - v).abs().flatten() for k, v in expected_weights.items()])
        assert float(off.max()) <= 2e-3 * STEPS
        assert float((off > 1e-6).float().mean()) < 1e-3


def sharded_bytes(case: Case) -> tuple[int, int]:
    """What this process holds of the model's parameters, and what all of them are."""
    model, spec = hf_model()
    rank, size = distributed.get_rank(), distributed.get_world_size()
    mesh = Mesh.build(Processes(rank, size, rank, size), case.layout, "cpu")
    trained = engine(model, spec, mesh=mesh)
    parameters = list(trained.model.parameters())
    return sum(p.to_local().nbytes for p in parameters), sum(p.nbytes for p in parameters)


def test_shards_are_a_process_s_part_of_the_memory() -> None:
    for own, whole in run_processes(4, sharded_bytes, Case(Layout(shard=4))):
        assert own < 0.3 * whole  # a quarter, and what does not divide evenly


def fail_on_nan(layout: Layout) -> str:
    """The error of a step whose weights are not finite, in which this process may have nothing but a filler."""
    model, spec = hf_model()
    rank, size = distributed.get_rank(), distributed.get_world_size()
    mesh = Mesh.build(Processes(rank, size, rank, size), layout, "cpu")
    trained = engine(model, spec, mesh=mesh)
    trained.trained["language_model.model.norm.weight"].to_local().data.fill_(torch.nan)
    whole = batches(examples(spec, 2), [2])
    with pytest.raises(TrainingError) as raised:
        trained.step(share(whole, mesh), 1.0, Labelled.of(whole))
    assert all(id in str(raised.value) for id in whole[0].ids)
    return str(raised.value)


def test_a_failure_names_the_same_samples_in_every_process_fillers_or_not() -> None:
    first, second = run_processes(2, fail_on_nan, Layout(shard=2))
    assert first == second
