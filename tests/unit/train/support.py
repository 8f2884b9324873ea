"""What the training tests share: tiny runs, stopped and looked at."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from llava_core.config import RunConfig, build_config
from llava_core.config.load import merge
from llava_core.engine.processes import Processes
from llava_core.plugins import Registry
from llava_core.testing.datasets import TinyParts
from llava_core.train import loop, resume
from llava_core.train.interrupt import StopRequest
from llava_core.train.prepare import Run, open_run, prepare
from llava_core.train.stored import Checkpoint
from tests.hardware import backend_name

TIMINGS = {"data_time", "time", "tflops", "tokens_per_sec", "text_tokens_per_sec", "memory", "validation_time"}
"""What a clock or the machine decides: everything else in a line of metrics repeats bit for bit."""


def tiny_settings(parts: TinyParts, output: Path, *overrides: str) -> dict[str, Any]:
    """The settings of a quick run on the backend under test, changed by `key=value` as on the command line."""
    source = output.with_suffix(".base.yaml")
    source.write_text(json.dumps(parts.settings(output)))  # JSON is YAML
    return merge(str(source), (f"backend.name={backend_name()}", *overrides))


def tiny_run(parts: TinyParts, output: Path, *overrides: str) -> Run:
    """A run of fresh objects, not yet resumed."""
    return prepare_alone(build_config(tiny_settings(parts, output, *overrides)), Registry.discover())


def prepare_alone(config: RunConfig, registry: Registry) -> Run:
    """A run of this process alone."""
    return prepare(config, registry, open_run(config, registry, Processes()), Processes())


def run_to_end(run: Run, stop: StopRequest | None = None) -> list[list[str]]:
    """Resume and train as `train` does, without the export; the sample ids of each step taken."""
    taken: list[list[str]] = []
    with spied_steps(run, taken):
        done, _ = resume.resume(run)
        loop.run_steps(run, done, StopRequest() if stop is None else stop, Registry.discover(), quiet())
    return taken


@contextmanager
def spied_steps(run: Run, taken: list[list[str]]) -> Iterator[None]:
    """Notes which samples reach the engine, in order; the engine itself is untouched."""
    step = run.engine.step

    def noting(batches: Any, *rest: Any) -> Any:
        taken.append([id for batch in batches for id in batch.ids])
        return step(batches, *rest)

    run.engine.step = noting  # type: ignore[method-assign]
    try:
        yield
    finally:
        run.engine.step = step  # type: ignore[method-assign]


def before_step(run: Run, act: Callable[[int], object]) -> None:
    """From now on `act` is called before the engine takes a step, with the step's number, from 1 on."""
    step, number = run.engine.step, 0

    def acting(*arguments: Any) -> Any:
        nonlocal number
        number += 1
        act(number)
        return step(*arguments)

    run.engine.step = acting  # type: ignore[method-assign]


def checkpoint_files(output: Path) -> dict[str, bytes]:
    """What each file of each checkpoint of a run holds."""
    root = output / "checkpoints"
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def metrics_rows(output: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock decides; a line that is not strict JSON raises."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x, parse_constant=_refuse).items() if k not in TIMINGS} for x in lines]


def engine_tensors(run: Run) -> dict[str, Tensor]:
    """Weights, moments and random states, copied to the host."""
    return {name: tensor.to("cpu", copy=True) for name, tensor in run.engine.state()[0].items()}


def whole_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All that a checkpoint holds, on the host."""
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def assert_bit_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert not different, f"{len(different)} of {len(expected)} differ: {different[:5]}"


def quiet() -> Console:
    return Console(file=io.StringIO())


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
