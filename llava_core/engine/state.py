"""What an engine remembers between steps: collected for a checkpoint, and restored from one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from llava_core.backend.interface import Rng
from llava_core.engine.loss_scale import LossScale
from llava_core.engine.parts import Facts, Region, laid_out_like, local_part
from llava_core.errors import CheckpointError

Trained: TypeAlias = Mapping[str, Tensor]
"""The parameters that learn, by their names in the model."""


class Stored(Protocol):
    """The tensors of a checkpoint, by the names that `collect` gave them."""

    @property
    def tensors(self) -> Mapping[str, Facts]:
        """What there is."""

    def read(self, name: str, region: Region | None = None) -> Tensor:
        """A box of a tensor, or all of it, on the host. Raises CheckpointError."""


def collect(
    trained: Trained, optimizer: Optimizer, rng: Rng, loss_scale: LossScale | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What learns and what the optimizer knows: tensors by logical name, and JSON values. Nothing frozen."""
    tensors = {f"model.{name}": parameter.detach() for name, parameter in trained.items()}
    for name, parameter in trained.items():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = value
    tensors |= {f"rng.{name}": state for name, state in rng.state().items()}
    return tensors, {"loss_scale": {} if loss_scale is None else asdict(loss_scale)}


@torch.no_grad()
def restore(stored: Stored, learning: Mapping[str, Facts], trained: Trained, optimizer: Optimizer, rng: Rng) -> None:
    """Return weights, optimizer and random state to what was stored, bit for bit; each process reads what it holds.

    Args:
        learning: every parameter that learns, of which `trained` are those of this process's stages.

    Raises:
        CheckpointError: it belongs to another model or another choice of trainable parts, or cannot be read.
    """
    tensors = stored.tensors
    _check_names(tensors, learning)
    moments: dict[str, dict[str, Tensor]] = {}
    for name in tensors:
        kind, _, rest = name.partition(".")
        if kind == "model" and rest in trained:
            part = local_part(trained[rest])
            part.data.copy_(stored.read(name, part.region))
        elif kind == "optimizer":
            key, _, parameter_name = rest.partition(".")
            if parameter_name in trained:
                value = _read_like(stored, name, trained[parameter_name])
                moments.setdefault(parameter_name, {})[key] = value
    _load_moments(moments, trained, optimizer)
    rng.load_state({name.removeprefix("rng."): stored.read(name) for name in tensors if name.startswith("rng.")})


def _read_like(stored: Stored, name: str, parameter: Tensor) -> Tensor:
    """What the optimizer keeps of a parameter: laid out as it is, or a plain value such as the number of its steps."""
    if stored.tensors[name].shape != tuple(parameter.shape):
        return stored.read(name)
    part = local_part(parameter)
    return laid_out_like(parameter, stored.read(name, part.region).to(part.data.device))


def _load_moments(moments: Mapping[str, dict[str, Tensor]], trained: Trained, optimizer: Optimizer) -> None:
    """Through the optimizer's own loading, which knows where each of its values must live."""
    names = {id(parameter): name for name, parameter in trained.items()}
    ordered = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    numbered = {index: moments[name] for index, name in enumerate(ordered) if name in moments}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": numbered})


def _check_names(tensors: Mapping[str, Facts], learning: Mapping[str, Facts]) -> None:
    found = {name.removeprefix("model."): facts for name, facts in tensors.items() if name.startswith("model.")}
    differing = sorted(k for k in found.keys() | learning.keys() if found.get(k) != learning.get(k))
    if differing:
        raise CheckpointError(
            f"the checkpoint trains other parameters than this run; {len(differing)} differ, the first: "
            f"{', '.join(differing[:5])}. Resume with the config it was made with, or use another output folder."
        )
