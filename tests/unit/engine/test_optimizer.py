"""Which parameters decay and at which rate each part learns, against transformers' Trainer."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedModel, Trainer

from llava_core.data.batch import Labelled
from llava_core.engine.torch_engine import TorchEngine
from llava_core.testing.models import classic_name, tiny_vision_config
from tests.unit.engine.support import batches, engine, examples, hf_model

EVERYTHING = ("vision", "projector", "language")
SIGLIP = {"vision": tiny_vision_config("siglip"), "vision_feature_select_strategy": "full"}


def decaying(trained: TorchEngine) -> set[str]:
    names = {id(p): name for name, p in trained.trained.items()}
    groups = [group for group in trained.optimizer.param_groups if group["weight_decay"]]
    return {names[id(p)] for group in groups for p in group["params"]}


def trainers_decaying(model: PreTrainedModel) -> set[str]:
    """By transformers' own rule, which looks at the modules' types and at the names."""
    return {classic_name(model, name) for name in Trainer.get_decay_parameter_names(None, model)}  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{}, SIGLIP], ids=["clip", "siglip"])
def test_the_parameters_that_decay_are_those_of_transformers_trainer(changes: dict[str, Any]) -> None:
    model, spec = hf_model(**changes)
    trained = engine(model, spec, trainable=EVERYTHING, weight_decay=0.1)
    expected = {name for name in trainers_decaying(model) if ".vision_model.head." not in name}  # no part of a LLaVA
    assert decaying(trained) == expected
    assert 0 < len(expected) < len(trained.trained)


def test_each_part_has_its_own_rate_scaled_by_the_schedule() -> None:
    model, spec = hf_model()
    trained = engine(model, spec, trainable=EVERYTHING, vision=1e-5, projector=2e-4, language=3e-3)
    trained.step(batches(examples(spec, 2), [2]), 0.25)
    rates = {group["name"]: group["lr"] for group in trained.optimizer.param_groups}
    assert rates == {"vision": 0.25 * 1e-5, "projector": 0.25 * 2e-4, "language": 0.25 * 3e-3}


@pytest.mark.device
@pytest.mark.parametrize("trainable", [("projector",), ("language",), ("projector", "language"), ("vision",)])
def test_frozen_parts_have_no_gradient_and_no_optimizer_state(trainable: tuple[str, ...]) -> None:
    model, spec = hf_model()
    trained = engine(model, spec, trainable=trainable)
    before = {name: p.detach().clone() for name, p in trained.model.named_parameters()}
    step = batches(examples(spec), [4, 4])
    trained._accumulate(step, Labelled.of(step))
    touched = {name for name, p in trained.model.named_parameters() if p.grad is not None}
    assert touched <= trained.trained.keys()
    trained.optimizer.zero_grad()
    trained.step(step, 1.0)
    names = {id(p): name for name, p in trained.model.named_parameters()}
    assert {names[id(p)] for p in trained.optimizer.state} == touched
    for name, parameter in trained.model.named_parameters():
        assert parameter.equal(before[name]) == (name not in touched), name
    saved = {name.partition(".")[2] for name in trained.state()[0] if name.startswith("model.")}
    assert saved == trained.trained.keys()
