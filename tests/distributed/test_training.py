"""Whole runs on several processes, forked from the test: the same losses as on one, whatever stops and resumes them."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from torch import distributed

from llava_core.config import build_config
from llava_core.engine.processes import Processes
from llava_core.plugins import Registry
from llava_core.testing.datasets import VOCAB_SIZE, TinyParts, tiny_parts
from llava_core.testing.models import TINY_PINPOINTS, save_folder, tiny_model, tiny_text_config
from llava_core.train import loop, resume
from llava_core.train.interrupt import StopRequest
from llava_core.train.prepare import open_run, prepare
from tests.distributed.processes import run_processes
from tests.unit.train.support import tiny_settings

TOLERANCE = 1e-5
"""Relative, in fp32: sums in another order, through the updates of six steps."""


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> TinyParts:
    return tiny_parts(tmp_path_factory.mktemp("parts"))


def train(settings: dict[str, Any]) -> int:
    """A run on the processes that this one has joined already."""
    size = distributed.get_world_size() if distributed.is_initialized() else 1
    rank = distributed.get_rank() if size > 1 else 0
    processes, registry = Processes(rank, size, rank, size), Registry.discover()
    config = build_config(settings)
    run = prepare(config, registry, open_run(config, registry, processes), processes)
    return loop.train_prepared(run, registry, Console(quiet=True)).steps


def rows(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


TILES = ("data.image_aspect=tiles", "data.max_tiles=4")
ANYRES = ("data.image_aspect=anyres", f"model.image_grid_pinpoints={[list(point) for point in TINY_PINPOINTS]}")
SAME = ("step", "tokens", "lr", "epoch", "samples", "text_tokens", "image_tokens", "label_tokens", "skipped")


def assert_same_numbers(found: Path, expected: Path) -> None:
    for row, wanted in zip(rows(found), rows(expected), strict=True):
        assert {key: row[key] for key in SAME} == {key: wanted[key] for key in SAME}
        assert row["loss"] == pytest.approx(wanted["loss"], rel=TOLERANCE)
        assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=TOLERANCE)


@pytest.mark.parametrize(
    ("size", "overrides"),
    [
        (2, ()),
        (3, ("parallel.data=grad",)),
        (4, ("parallel.replicas=2",)),
        (2, ("parallel.data=replicate", "batch.micro_tokens=null", "batch.micro_size=2")),
        (2, ("data.order=modality_length",)),
        (2, ("data.num_workers=1",)),
        (2, ("train.max_steps=null", "train.max_tokens=8000")),
        (2, ("parallel.tensor=2",)),
        (4, ("parallel.tensor=2", "parallel.sequence=false")),
        (2, ("parallel.context=2",)),
        (2, ("parallel.pipeline=2", "train.recompute=selective")),
        (2, ("parallel.tensor=2", "train.recompute=selective", "train.recompute_layers=1")),
        (4, ("parallel.context=2", "train.recompute=full")),
        (4, ("parallel.context=2", "parallel.tensor=2")),
        (2, ("parallel.pipeline=2",)),
        (2, ("parallel.pipeline=2", "batch.micro_tokens=null", "batch.micro_size=2")),
        (4, ("parallel.pipeline=2", "parallel.context=2")),
        (2, (*TILES, "parallel.tensor=2")),
        (2, ANYRES),
        (2, (*ANYRES, "parallel.pipeline=2")),
        (4, (*ANYRES, "parallel.context=2", "parallel.tensor=2")),
    ],
)
def test_the_numbers_are_those_of_one_process(
    size: int, overrides: tuple[str, ...], parts: TinyParts, tmp_path: Path
) -> None:
    train(tiny_settings(parts, tmp_path / "one", *(o for o in overrides if not o.startswith("parallel"))))
    spread = tiny_settings(parts, tmp_path / "many", *overrides)
    assert run_processes(size, train, spread) == [6] * size
    assert_same_numbers(tmp_path / "many", tmp_path / "one")


@pytest.mark.parametrize(
    "starts",
    [
        [(3,), (1,), (2, "parallel.data=replicate")],
        [(2, "parallel.context=2"), (1,), (4, "parallel.context=2", "parallel.tensor=2")],
        [(2, "parallel.tensor=2"), (4, "parallel.context=2"), (3, "parallel.data=grad")],
    ],
    ids=["data", "context", "products"],
)
def test_a_run_stopped_on_one_layout_goes_on_on_another(
    starts: list[tuple[Any, ...]], parts: TinyParts, tmp_path: Path
) -> None:
    """Each start takes up the state of the one before and does two steps."""
    train(tiny_settings(parts, tmp_path / "one"))
    output = tmp_path / "many"
    for done, (size, *layout) in zip((2, 4, 6), starts, strict=True):
        assert run_processes(size, train_two_steps, tiny_settings(parts, output, *layout)) == [done] * size
    assert_same_numbers(output, tmp_path / "one")


def test_a_model_with_a_sliding_window_trains_alike_on_shared_sequences(parts: TinyParts, tmp_path: Path) -> None:
    """Mistral, with a window that is shorter than most samples, on the kernels that a run chooses."""
    language = Path(shutil.copytree(parts.language, tmp_path / "mistral"))
    text = tiny_text_config("mistral", vocab_size=VOCAB_SIZE, num_key_value_heads=2, sliding_window=6)
    save_folder(tiny_model(text), language)
    train(tiny_settings(parts, tmp_path / "one", f"model.language={language}"))
    shared = tiny_settings(parts, tmp_path / "many", f"model.language={language}", "parallel.context=2")
    assert run_processes(2, train, shared) == [6] * 2
    assert_same_numbers(tmp_path / "many", tmp_path / "one")


def test_a_run_stopped_on_a_pipeline_goes_on_without_and_back(parts: TinyParts, tmp_path: Path) -> None:
    train(tiny_settings(parts, tmp_path / "one"))
    output = tmp_path / "many"
    pipeline = tiny_settings(parts, output, "parallel.pipeline=2")
    assert run_processes(4, train_two_steps, pipeline) == [2] * 4
    assert run_processes(2, train_two_steps, tiny_settings(parts, output, "parallel.context=2")) == [4] * 2
    assert run_processes(2, train, pipeline) == [6] * 2
    assert_same_numbers(output, tmp_path / "one")


def test_a_process_whose_rows_are_all_unusable_goes_along(parts: TinyParts, tmp_path: Path) -> None:
    """Of the first step the first of two processes has nothing, and it is the one that shows the first sample."""
    data = json.loads(parts.data.read_text())
    for index in range(0, 8, 2):
        data[index]["conversations"] = []
    broken = tmp_path / "data.json"
    broken.write_text(json.dumps(data))
    changes = (f"data.path={broken}", "data.order=sequential", "data.max_bad_fraction=0.5")
    train(tiny_settings(parts, tmp_path / "one", *changes))
    assert run_processes(2, train, tiny_settings(parts, tmp_path / "many", *changes)) == [6] * 2
    assert_same_numbers(tmp_path / "many", tmp_path / "one")
    listed = [(tmp_path / name / "quarantine.jsonl").read_text() for name in ("one", "many")]
    assert listed[0] == listed[1]


class StopAfter(StopRequest):
    """A signal that comes after so many steps of this start."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.looks_left = steps + 1

    def agree(self, gather: Callable[[int], list[int]]) -> bool:
        self.looks_left -= 1
        self.signal = signal.SIGTERM if self.looks_left <= 0 else None
        return super().agree(gather)


def train_two_steps(settings: dict[str, Any]) -> int:
    """`train`, stopped by a signal after two steps; the steps done since the run began."""
    size = distributed.get_world_size() if distributed.is_initialized() else 1
    rank = distributed.get_rank() if size > 1 else 0
    processes, registry = Processes(rank, size, rank, size), Registry.discover()
    config = build_config(settings)
    run = prepare(config, registry, open_run(config, registry, processes), processes)
    done, _ = resume.resume(run)
    return loop.run_steps(run, done, StopAfter(2), registry, Console(quiet=True))
