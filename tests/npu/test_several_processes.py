"""Two processes on two NPUs, started as a user starts them: HCCL, sharded weights, and the numbers of one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_core.testing.datasets import TinyParts, tiny_parts

pytestmark = pytest.mark.npu

TOLERANCE = 2e-6
"""Relative, in fp32: the same sums in another order, over six steps. Measured 4e-7."""


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> TinyParts:
    return tiny_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def alone(parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return train(parts, tmp_path_factory.mktemp("alone") / "run")


def train(parts: TinyParts, output: Path, *arguments: str) -> list[dict[str, Any]]:
    """The steps' metrics of `llava-core train`."""
    config = output.with_suffix(".yaml")
    config.write_text(json.dumps(parts.settings(output)))  # JSON is YAML
    command = [sys.executable, "-m", "llava_core", "train", str(config), "--backend", "npu", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "overrides", [(), ("parallel.tensor=2",), ("parallel.context=2",)], ids=["data", "tensor", "context"]
)
def test_two_processes_have_the_numbers_of_one(
    overrides: tuple[str, ...], alone: list[dict[str, Any]], device: torch.device, parts: TinyParts, tmp_path: Path
) -> None:
    if torch.npu.device_count() < 2:
        pytest.skip("two processes need two devices")
    found = train(parts, tmp_path / "run", "--nproc", "2", *overrides)
    assert [row["loss"] for row in found] == [pytest.approx(row["loss"], rel=TOLERANCE) for row in alone]
    assert [row["grad_norm"] for row in found] == [pytest.approx(row["grad_norm"], rel=TOLERANCE) for row in alone]
