"""Parameter groups and the optimizer over them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from llava_core.backend import Backend
from llava_core.model.freeze import part_of


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], learning_rates: Mapping[str, float], weight_decay: float
) -> list[dict[str, Any]]:
    """A group for each part and whether it decays; biases and norms do not. `peak_lr` is what the schedule scales."""
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            groups.setdefault((part_of(name), _decays(name)), []).append(parameter)
    return [
        {
            "params": members,
            "name": part,
            "lr": learning_rates[part],
            "peak_lr": learning_rates[part],
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (part, decays), members in groups.items()
    ]


def build_optimizer(
    backend: Backend, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float, *, on_host: bool
) -> torch.optim.Optimizer:
    """The backend's own AdamW, or PyTorch's, which also updates what is kept on the host; without groups one that does
    nothing, for a stage where nothing learns."""
    if not groups:
        return torch.optim.AdamW([{"params": [], "peak_lr": 0.0}])
    if on_host:
        return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)
    own = backend.build_optimizer(groups, betas=betas, eps=eps)
    return own if own is not None else torch.optim.AdamW(groups, betas=betas, eps=eps)


def _decays(name: str) -> bool:
    module, _, leaf = name.rpartition(".")
    return leaf != "bias" and "norm" not in module.rpartition(".")[2]
