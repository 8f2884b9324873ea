"""Runs the demo's stage 1 on several backends, in the environment of the Python that runs this file.

    python stage1.py FOLDER BACKEND…

Writes FOLDER/losses.json: each backend's loss at every step, and where llava_core was imported from.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console

import llava_core
from llava_core.config import RunConfig
from llava_core.demo import run, stages, towers
from llava_core.plugins import Registry
from llava_core.train.loop import train_model
from llava_core.train.metrics import read_metrics

# The towers need not be good here, and stage 1 need not be long: only what two backends make of them is compared.
TOWER_STEPS = 30
STAGE_STEPS = 40


def shortened(config: RunConfig, output: Path) -> RunConfig:
    """The demo's own config, in another folder and with fewer steps."""
    train = config.train.model_copy(update={"max_steps": STAGE_STEPS})
    return config.model_copy(update={"train": train, "output": output})


def main(folder: Path, backends: list[str]) -> None:
    console = Console()
    towers.VISION_STEPS = towers.LANGUAGE_STEPS = TOWER_STEPS
    run.make_parts(folder, 0, console)
    losses = {}
    for backend in backends:
        output = folder / f"stage1-{backend}"
        train_model(shortened(stages.stage1(folder, backend, 0), output), Registry.discover(), console)
        losses[backend] = [row["loss"] for row in read_metrics(output)]
    found = {"llava_core": llava_core.__file__, "losses": losses}
    (folder / "losses.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
