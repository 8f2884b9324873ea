"""Which parts of a model are trained."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

PARTS = {
    "vision": "vision_tower.",
    "projector": "multi_modal_projector.",
    "language": "language_model.",
}
"""The model's parts by the prefix of their parameters' names."""


def part_of(name: str) -> str:
    """The part that a parameter belongs to."""
    return next(part for part, prefix in PARTS.items() if name.startswith(prefix))


def train_only(model: nn.Module, parts: Collection[str]) -> None:
    """Freeze every parameter outside `parts`."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in parts)
