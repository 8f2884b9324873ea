"""Every recipe can be planned on a model of the size it is for: its layout divides it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava_core.config import recipe_names
from llava_core.plan.planning import make_plan
from llava_core.plan.subject import Subject, planned_config
from llava_core.plugins import Registry

MODELS = Path(__file__).resolve().parents[2] / "models"
CLIP = f"model.vision={MODELS / 'clip-vit-large-patch14-336'}"

SUBJECTS: dict[str, tuple[str, int]] = {
    "llava15-7b-pretrain": ("vicuna-7b-v1.5", 8),
    "llava15-7b-sft": ("vicuna-7b-v1.5", 8),
    "llava-internlm2-20b-pretrain": ("internlm2-chat-20b", 8),
    "llava-internlm2-20b-sft-lora": ("internlm2-chat-20b", 8),
    "llava-mistral-7b-pretrain": ("mistral-7b-instruct-v0.2", 8),
    "neva-7b-pretrain": ("vicuna-7b-v1.5", 8),
    "neva-7b-sft": ("vicuna-7b-v1.5", 8),
    "llama31-8b-sft": ("llama-3.1-8b", 8),
    "llama31-8b-pretrain": ("llama-3.1-8b", 8),
}
"""The language model of each, and the processes."""


def test_every_recipe_is_planned_here() -> None:
    assert set(recipe_names()) <= set(SUBJECTS)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", recipe_names())
def test_a_recipe_is_planned(recipe: str, tmp_path: Path) -> None:
    language, size = SUBJECTS[recipe]
    assert subject(recipe, MODELS / language).check(size).world_size == size
    plan = make_plan(subject(recipe, shortened(MODELS / language, tmp_path)), size, 0)
    assert plan.estimate.layout.world_size == size
    # More than the weights' share, and all of it told apart.
    assert plan.estimate.largest["weights"] < plan.estimate.peak == sum(plan.estimate.memory_at_peak.values())


def subject(recipe: str, language: Path) -> Subject:
    model = (f"model.path={language}",) if recipe.startswith("llama31") else (CLIP, f"model.language={language}")
    return Subject.of(planned_config(recipe, (*model, "backend.name=cuda"), {}), Registry.discover())


def shortened(model: Path, folder: Path) -> Path:
    """The model with four layers: more are planned alike, only longer."""
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    return folder
