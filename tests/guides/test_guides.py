"""Each guide's set-up trains through its recipe, and goes on inside an epoch with other workers: the same bits."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

import llava_core
from llava_core.config import RunConfig
from tests.guides.setups import QUIET, SETUPS, Folders
from tests.hardware import torch_settings_kept
from tests.unit.train.support import metrics_rows

STEPS, STOPPED_AFTER = 4, 2
SAVED = f"checkpoints/step-{STOPPED_AFTER:08d}"


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("guides"))


def config(name: str, folders: Folders, output: Path, workers: int) -> RunConfig:
    setup = SETUPS[name]
    end = () if any("max_tokens" in change for change in setup.toy) else (f"train.max_steps={STEPS}",)
    saved = (f"output={output}", f"data.num_workers={workers}", f"checkpoint.every_steps={STOPPED_AFTER}")
    return llava_core.load_config(setup.recipe, [*setup.given(folders), *setup.toy, *end, *QUIET, *saved])


@pytest.mark.parametrize("name", [*SETUPS])
def test_a_guides_set_up_trains_and_goes_on(name: str, folders: Folders, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    with torch_settings_kept():
        llava_core.train_model(config(name, folders, whole, workers=0))
        shutil.copytree(whole / SAVED, resumed / SAVED)
        shutil.copy(whole / "metrics.jsonl", resumed)
        llava_core.train_model(config(name, folders, resumed, workers=2))
    assert metrics_rows(whole) == metrics_rows(resumed)
    rows = [row for row in metrics_rows(whole) if "loss" in row]
    assert len(rows) > STOPPED_AFTER
    assert all(math.isfinite(row["loss"]) and row["label_tokens"] > 0 for row in rows)
    assert rows[STOPPED_AFTER - 1]["epoch"] % 1 != 0  # in the middle of one
    assert json.loads((whole / "hf" / "config.json").read_text())
    assert (whole / "hf" / "model.safetensors").read_bytes() == (resumed / "hf" / "model.safetensors").read_bytes()
    assert not (whole / "quarantine.jsonl").exists()
    validated = [row["step"] for row in metrics_rows(whole) if "validation_loss" in row]
    assert bool(validated) == any(given.startswith("validation.") for given in SETUPS[name].given(folders))
