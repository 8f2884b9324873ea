"""Runs with adapters on several processes: the numbers of one, and the same adapter at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import distributed

from llava_core.config import build_config
from llava_core.engine.processes import Processes
from llava_core.errors import LlavaError
from llava_core.plugins import Registry
from llava_core.testing.datasets import TinyParts, tiny_parts
from llava_core.train.agreement import by_first
from llava_core.train.loop import train_prepared
from llava_core.train.prepare import open_run, prepare
from tests.distributed.processes import run_processes
from tests.distributed.test_training import assert_same_numbers, rows, train
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


def fail_then_go_on(settings: dict[str, Any], foreign: Path) -> tuple[list[str], int]:
    """What stops a run in whose adapter folder a foreign file appears; and the steps of the same run without it."""
    config, registry = build_config(settings), Registry.discover()
    processes = Processes(distributed.get_rank(), 2, distributed.get_rank(), 2)

    def attempt(before: Callable[[], object]) -> int:
        run = prepare(config, registry, open_run(config, registry, processes), processes)
        by_first(processes, before)
        return train_prepared(run, registry, Console(quiet=True)).steps

    with pytest.raises(LlavaError) as failure:
        attempt(lambda: (foreign.parent.mkdir(parents=True), foreign.write_text("mine")))
    by_first(processes, foreign.unlink)
    return [type(failure.value).__name__, str(failure.value)], attempt(lambda: None)


def test_an_adapter_that_cannot_be_written_costs_no_training(parts: TinyParts, tmp_path: Path) -> None:
    """The others do not go on to other collectives, the model and the state are there, and the run ends later."""
    output = tmp_path / "run"
    settings = tiny_settings(parts, output, *ADAPTERS, "train.max_steps=2", "parallel.data=full")
    first, second = run_processes(2, fail_then_go_on, settings, output / "adapter" / "notes.txt")
    refusal = f"{output / 'adapter'} holds notes.txt, so it is not replaced by an adapter."
    assert [found[0][0] for found in (first, second)] == ["WeightsError", "CheckpointError"]
    assert refusal in first[0][1]
    assert f"process 0: WeightsError: {refusal}" in second[0][1]
    assert (first[1], second[1]) == (2, 2)
    assert len(rows(output)) == 2  # nothing was trained twice
    assert (output / "adapter" / "adapter_model.safetensors").exists()


def test_dora_is_sharded_alike(parts: TinyParts, tmp_path: Path) -> None:
    settings = (*ADAPTERS, "lora.dora=true", "train.max_steps=3")
    train(tiny_settings(parts, tmp_path / "one", *settings))
    assert run_processes(2, train, tiny_settings(parts, tmp_path / "many", *settings)) == [3] * 2
    assert_same_numbers(tmp_path / "many", tmp_path / "one")
