"""Runs with adapters on several processes: the numbers of one, and the same adapter at the end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_core.testing.datasets import TinyParts, tiny_parts
from tests.distributed.processes import run_processes
from tests.distributed.test_training import assert_same_numbers, train
from tests.unit.train.support import tiny_settings

ADAPTERS = (
    "train.trainable=[projector,language,vision]",
    "lora.language.rank=4",
    "lora.language.alpha=8",
    "lora.vision.rank=2",
    "lora.vision.alpha=4",
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> TinyParts:
    return tiny_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def alone(parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    output = tmp_path_factory.mktemp("alone") / "run"
    train(tiny_settings(parts, output, *ADAPTERS))
    return output


@pytest.mark.parametrize(
    ("size", "overrides"),
    [
        (2, ()),
        (2, ("parallel.data=grad", "train.recompute=selective")),
        (2, ("parallel.data=replicate", "train.recompute=full")),
        (2, ("parallel.context=2",)),
        (2, ("parallel.pipeline=2",)),
    ],
)
def test_the_numbers_are_those_of_one_process(
    size: int, overrides: tuple[str, ...], parts: TinyParts, alone: Path, tmp_path: Path
) -> None:
    output = tmp_path / "many"
    assert run_processes(size, train, tiny_settings(parts, output, *ADAPTERS, *overrides)) == [6] * size
    assert_same_numbers(output, alone)
    for file in ("adapter/adapter_model.safetensors", "hf/model.safetensors"):
        found, expected = load_file(output / file), load_file(alone / file)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            # Adam makes a tiny gradient's last bits as large as the rest of it: measured 2e-6, and a step is 1e-3.
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-5, msg=name)


def test_dora_is_sharded_alike(parts: TinyParts, tmp_path: Path) -> None:
    settings = (*ADAPTERS, "lora.dora=true", "train.max_steps=3")
    train(tiny_settings(parts, tmp_path / "one", *settings))
    assert run_processes(2, train, tiny_settings(parts, tmp_path / "many", *settings)) == [3] * 2
    assert_same_numbers(tmp_path / "many", tmp_path / "one")
