"""Pipelines: each step's loss, gradient norm and weights are those of one process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llava_core.data.batch import Batch, Labelled
from llava_core.engine.layout import Layout
from llava_core.engine.loss import LossMode
from llava_core.engine.recompute import Keeping, Recompute
from tests.distributed.layouts import build_engine, build_mesh, take_share, whole_tensors
from tests.distributed.processes import run_processes
from tests.unit.engine.support import batches, examples

STEPS = 4
TOLERANCE = 1e-5
"""Relative, of loss and gradient norm in fp32: the same terms in another order, through four updates by Adam, which
divides by what it sums."""


@dataclass(frozen=True)
class Case:
    """A layout with a pipeline, the layers of its stages, and what is trained."""

    layout: Layout
    stage_layers: tuple[int, ...] = ()
    loss: LossMode = "token_mean"
    trainable: tuple[str, ...] = ("projector", "language")
    recompute: Recompute = "none"


CASES = {
    "two_stages": Case(Layout(pipeline=2)),
    "uneven": Case(Layout(pipeline=2), stage_layers=(1, 3)),
    "four_stages": Case(Layout(pipeline=4)),
    "interleaved": Case(Layout(pipeline=2), stage_layers=(1, 1, 1, 1)),
    "stage_1": Case(Layout(pipeline=2), trainable=("projector",)),
    "everything": Case(Layout(pipeline=2), trainable=("vision", "projector", "language")),
    "micro_batch_mean": Case(Layout(pipeline=2), loss="micro_batch_mean"),
    "sequence_mean": Case(Layout(pipeline=2), loss="sequence_mean"),
    "recompute": Case(Layout(pipeline=2), recompute="full"),
    "with_shards": Case(Layout(pipeline=2, shard=2)),
    "with_replicas": Case(Layout(pipeline=2, replicate=2)),
    "interleaved_with_shards": Case(Layout(pipeline=2, shard=2), stage_layers=(1, 1, 1, 1)),
    "with_tensor": Case(Layout(pipeline=2, tensor=2)),
    "with_context": Case(Layout(pipeline=2, context=2)),
    "interleaved_with_context": Case(Layout(pipeline=2, context=2), stage_layers=(1, 1, 1, 1)),
    "with_all": Case(Layout(pipeline=2, shard=2, context=2, tensor=2)),
}


def step_batches(number: int, spec: Any) -> list[Batch]:
    """Four micro-batches, the last of text alone; of the last step, one."""
    samples = examples(spec, seed=number)
    return batches(samples, [2, 1, 2, 3]) if number < STEPS - 1 else batches(samples[:2], [2])


def train(case: Case) -> tuple[list[tuple[float, float, float]], dict[str, Tensor]]:
    """Loss and gradient norm of each step, the loss on its tokens when it was taken, and what this process's trained
    weights became."""
    options = {"trainable": case.trainable, "loss": case.loss, "keeping": Keeping(case.recompute)}
    trained = build_engine(build_mesh(case.layout), case.stage_layers, **options)
    results = []
    for number in range(STEPS):
        whole = step_batches(number, trained.model.spec)
        own, labelled = take_share(whole, trained), Labelled.of(whole)
        result = trained.step(own, 1.0, labelled)
        results.append((result.loss, result.grad_norm, trained.evaluate(own, labelled)))
    return results, whole_tensors(trained.trained)


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_one_process(name: str) -> None:
    case = CASES[name]
    expected, expected_weights = train(replace(case, layout=Layout()))
    found = run_processes(case.layout.world_size, train, case)
    for results, _ in found:
        for numbers, expected_numbers in zip(results, expected, strict=True):
            assert numbers == pytest.approx(expected_numbers, rel=TOLERANCE)
    weights = {name: weight for _, trained in found for name, weight in trained.items()}
    assert weights.keys() == expected_weights.keys()
    # AdamW moves a weight by at most the learning rate a step, in a direction that noise decides where a gradient is
    # next to nothing; all but those agree.
    off = torch.cat([(weights[k] - v).abs().flatten() for k, v in expected_weights.items()])
    assert float(off.max()) <= 2e-3 * STEPS
    assert float((off > 1e-6).float().mean()) < 1e-3
