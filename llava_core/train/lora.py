"""What adapters ask of a run: to be possible, random numbers that a resume repeats, and a folder of their own."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from llava_core.config import RunConfig
from llava_core.config.lora import LoraConfig
from llava_core.errors import ConfigError
from llava_core.model.adapters import Adapters, LowRank
from llava_core.weights.adapter_folder import learnt_names, write_adapter
from llava_core.weights.export import whole_weights

if TYPE_CHECKING:
    from llava_core.train.prepare import Run

ADAPTER_FOLDER = "adapter"
"""Where in the output folder the adapters are, beside the export."""


def check_lora(config: RunConfig) -> None:
    """The adapters are of parts that learn, and on a layout that they are made for.

    Raises:
        ConfigError: they are not, or peft is not installed.
    """
    if config.lora is None:
        return
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("lora needs peft: pip install 'llava-core[lora]'")
    learning = list(config.train.trainable)
    for part in config.lora.parts:
        if part not in learning:
            raise ConfigError(
                f"lora.{part} is set, and train.trainable = {learning} freezes that part: add {part} to it (its "
                f"adapters learn, its own weights stay), or leave lora.{part} out."
            )
    if config.parallel.tensor > 1:
        raise ConfigError(
            f"parallel.tensor = {config.parallel.tensor}: adapters are not divided over processes that share matrices; "
            "share the weights by parallel.data=full, or the layers by parallel.pipeline."
        )


def adapters_of(config: LoraConfig) -> Adapters:
    """The model's part of the config."""
    parts = {part: LowRank(given.rank, given.alpha, tuple(given.targets)) for part, given in config.parts.items()}
    return Adapters(parts, config.dropout, config.dora)


def seed_step(run: Run, step: int) -> None:
    """Before a step in which adapters draw what they drop: the same numbers whatever run comes to it, and others in
    each process, whose samples differ."""
    if run.config.lora is not None and run.config.lora.dropout > 0:
        text = f"{run.config.train.seed} {step} {run.processes.rank}"
        run.hardware.backend.rng.seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))


def export_adapter(run: Run, folder: Path) -> None:
    """What learnt, as a folder of peft's; every process calls it. Raises as `write_adapter`."""
    model, trainable = run.engine.model, run.config.train.trainable
    assert model.adapters is not None
    names = frozenset(learnt_names(model.spec, trainable, model.adapters))
    pipeline = run.engine.pipeline
    weights = whole_weights(model, names) if pipeline is None else pipeline.whole_weights(names)
    try:
        if run.processes.is_first:
            write_adapter(folder, model.spec, trainable, model.adapters, weights, base=run.config.model.path)
    finally:
        for _ in weights:  # as `export_model`: the others do not wait for one that failed
            pass
