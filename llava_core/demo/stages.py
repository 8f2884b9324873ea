"""The configs of the demo's two training stages: ordinary ones, which `llava-core train` runs as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_core.config import RunConfig, build_config
from llava_core.demo.digits import DigitData


def stage1(output: Path, backend: str, seed: int) -> RunConfig:
    """The projector alone learns, on captions: visual tokens come to mean something to the frozen language model."""
    data = DigitData(output / "data")
    return build_config(
        _common(output / "stage1", data, backend, seed)
        | {
            "model": {"vision": str(output / "clip"), "language": str(output / "llama")},
            "data": _data(data, data.captions, "plain"),
            "optimizer": {"learning_rate": 3e-3, "warmup_fraction": 0.03},
            "train": {"trainable": ["projector"], "max_steps": 150, "precision": "fp32", "seed": seed},
        }
    )


def stage2(output: Path, backend: str, seed: int) -> RunConfig:
    """Projector and language model learn to answer questions, from where stage 1 ended."""
    data = DigitData(output / "data")
    return build_config(
        _common(output / "stage2", data, backend, seed)
        | {
            "model": {"path": str(output / "stage1" / "hf")},
            "data": _data(data, data.conversations, "v1"),
            "optimizer": {"learning_rate": 1e-3, "warmup_fraction": 0.03},
            "train": {"trainable": ["projector", "language"], "max_steps": 120, "precision": "fp32", "seed": seed},
        }
    )


def _common(folder: Path, data: DigitData, backend: str, seed: int) -> dict[str, Any]:
    # fp32 and one thread: sums in the same order give the same losses at each run.
    return {
        "output": str(folder),
        "batch": {"global_size": 32, "micro_tokens": 2048},
        "backend": {"name": backend, "threads": 1},
    }


def _data(data: DigitData, rows: Path, template: str) -> dict[str, Any]:
    return {"path": str(rows), "images": str(data.images), "template": template, "max_length": 128}
