"""A 70B on 512 processes, planned on one: the numbers against what its config and its layout say by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_core.plan.planning import Plan, make_plan
from llava_core.plan.subject import Subject, planned_config
from llava_core.plugins import Registry

MODELS = Path(__file__).resolve().parents[2] / "models"
"""Configs with the sizes of the models that the folders are named after."""

WORLD, RANK, TENSOR, LAYERS = 512, 300, 8, 80


@pytest.fixture(scope="module")
def plan() -> Plan:
    settings = (
        f"model.vision={MODELS / 'clip-vit-large-patch14-336'}",
        f"model.language={MODELS / 'llama-3.1-70b'}",
        f"parallel.tensor={TENSOR}",
        "batch.global_size=512",
        "batch.micro_tokens=16384",
        "backend.name=cpu",
        "train.precision=bf16",
    )
    config = planned_config("llava15-7b-sft", settings, {})
    return make_plan(Subject.of(config, Registry.discover()), WORLD, RANK)


@pytest.mark.slow
def test_a_rank_of_512_of_a_70b(plan: Plan) -> None:
    vision, projector, language = plan.part_sizes()
    assert language[2] == 70_553_706_496  # Llama 3.1 70B, as its publishers count it
    assert projector[2] == 1024 * 8192 + 8192 + 8192 * 8192 + 8192
    # Of the decoder's matrices a rank has one part in 512; of its norms, which tensor parallel does not divide, in 64.
    norms = (2 * LAYERS + 1) * 8192
    # 16,032 rows of the vocabulary are not shared evenly by 64: this rank has half a row more than the mean, twice.
    assert language[3] == (language[2] - norms) / WORLD + norms / (WORLD / TENSOR) + 8192
    assert vision[3] == pytest.approx(vision[2] / 64, rel=1e-2)
    assert projector[3] == pytest.approx(projector[2] / 64, rel=1e-2)


@pytest.mark.slow
def test_its_exchanges(plan: Plan) -> None:
    found = {(c.kind, c.axis): c for c in plan.estimate.collectives}
    assert {axis for _, axis in found} == {"dp_shard", "tp", "all"}
    sums = found["reduce-scatter", "dp_shard"]
    # Once a step each: the layers, the projector, and what is left as the root; in fp32, whole but for tensor parallel.
    assert (sums.count, sums.processes) == (LAYERS + 2, WORLD // TENSOR)
    _, projector, language = plan.part_sizes()
    norms = (2 * LAYERS + 1) * 8192
    whole = 4 * (projector[2] + (language[2] - norms) / TENSOR + norms)
    assert sums.num_bytes == pytest.approx(whole, rel=1e-4)  # padded to equal shards
    assert (found["all-reduce", "all"].count, found["all-reduce", "all"].num_bytes) == (1, 4)  # the gradient norm


@pytest.mark.slow
def test_its_memory(plan: Plan) -> None:
    memory = plan.estimate.largest
    trained = sum(4 * p.num_local for p in plan.estimate.parameters if p.trained)
    frozen = sum(2 * p.num_local for p in plan.estimate.parameters if not p.trained)
    assert memory["weights"] == pytest.approx(trained + frozen, rel=1e-3)
    assert memory["optimizer"] == pytest.approx(2 * trained, rel=1e-3)  # two moments, and a count for each parameter
    assert memory["gradients"] == pytest.approx(trained, rel=1e-3)
    assert plan.estimate.peak == sum(plan.estimate.memory_at_peak.values())
