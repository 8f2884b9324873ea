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


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return ".lora_" in name


def plain_name(name: str) -> str:
    """What a weight would be called without adapters."""
    return name.replace(".base_layer.", ".")


def train_only(model: nn.Module, parts: Collection[str], adapted: Collection[str] = ()) -> None:
    """Freeze every parameter outside `parts`, and of those in `adapted` what is no adapter's."""
    for name, parameter in model.named_parameters():
        part = part_of(name)
        parameter.requires_grad_(part in parts and (part not in adapted or is_adapter(name)))
