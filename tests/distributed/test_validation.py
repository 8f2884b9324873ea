"""Validation on several processes: the loss of one process, and weights that are spread again afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from llava_core.data.batch import Labelled
from llava_core.engine.layout import Layout
from llava_core.engine.shard import Sharding
from llava_core.testing.datasets import TinyParts, tiny_parts
from llava_core.train.metrics import read_metrics, read_validations
from tests.distributed.layouts import build_engine, build_mesh, take_share
from tests.distributed.processes import run_processes
from tests.distributed.test_training import TOLERANCE, train
from tests.unit.engine.support import batches, examples
from tests.unit.train.support import tiny_settings


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> TinyParts:
    return tiny_parts(tmp_path_factory.mktemp("parts"))


VALIDATED = ("validation.fraction=0.3", "validation.every_steps=4")  # 12 rows: the last of its steps has four


@pytest.fixture(scope="module")
def one(parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    output = tmp_path_factory.mktemp("one") / "run"
    train(tiny_settings(parts, output, *VALIDATED))
    return output


@pytest.mark.parametrize(
    ("size", "layout"),
    [
        (3, ("parallel.data=grad", "data.num_workers=1")),
        (2, ("batch.micro_tokens=null", "batch.micro_size=4")),  # of the last four rows one process has none
        (2, ("parallel.tensor=2",)),
        (2, ("parallel.context=2",)),
        (2, ("parallel.pipeline=2",)),
    ],
)
def test_the_loss_is_that_of_one_process(
    size: int, layout: tuple[str, ...], parts: TinyParts, one: Path, tmp_path: Path
) -> None:
    assert run_processes(size, train, tiny_settings(parts, tmp_path / "run", *VALIDATED, *layout)) == [6] * size
    for read in (read_metrics, read_validations):
        found, expected = read(tmp_path / "run"), read(one)
        assert [row["step"] for row in found] == [row["step"] for row in expected]
        for row, wanted in zip(found, expected, strict=True):
            key = "loss" if "loss" in row else "validation_loss"
            assert row[key] == pytest.approx(wanted[key], rel=TOLERANCE)
    counts = ("validation_label_tokens", "validation_samples")
    found, expected = read_validations(tmp_path / "run"), read_validations(one)
    assert [[row[key] for key in counts] for row in found] == [[row[key] for key in counts] for row in expected]


def spread_after(keep_weights: bool) -> list[bool]:
    """Whether each parameter is this process's part alone: fresh, after an evaluation, and after a step."""
    sharding = Sharding(keep_weights=keep_weights, reduce_dtype=torch.float32)
    trained = build_engine(build_mesh(Layout(shard=2)), sharding=sharding)
    whole = batches(examples(trained.model.spec), [2, 1, 2, 3])
    own, labelled = take_share(whole, trained), Labelled.of(whole)
    found = []
    works: list[Any] = [lambda: None, lambda: trained.evaluate(own, labelled), lambda: trained.step(own, 1.0, labelled)]
    for work in works:
        work()
        found.append(all(isinstance(parameter, DTensor) for parameter in trained.model.parameters()))
    return found


@pytest.mark.parametrize("keep_weights", [False, True])
def test_no_process_keeps_gathered_weights(keep_weights: bool) -> None:
    assert run_processes(2, spread_after, keep_weights) == [[True] * 3] * 2
