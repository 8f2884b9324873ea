"""The examples run as they stand, at toy size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llava_core.testing.datasets import tiny_parts

EXAMPLES = Path(__file__).parents[2] / "examples"
QUICK = [
    "data.max_length=256",
    "batch={global_size: 8, micro_tokens: 512}",
    "train.max_steps=2",
    "train.precision=fp32",
    "backend={name: cpu, threads: 1}",
    "data.num_workers=0",
]


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.slow
def test_pretrain_then_sft_then_ask(tmp_path: Path) -> None:
    parts = tiny_parts(tmp_path)
    stage1, stage2 = tmp_path / "stage1", tmp_path / "stage2"
    # The tiny data has rows with several rounds, which `plain` does not take.
    plain = ["data.template=v1", *QUICK]
    run("pretrain.py", parts.vision, parts.language, parts.data, parts.images, stage1, *plain)
    run("sft.py", stage1 / "hf", parts.data, parts.images, stage2, *QUICK)
    assert "0.png:" in run("ask.py", stage2 / "hf", "What colour is this?", parts.images / "0.png")
