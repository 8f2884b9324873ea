"""Weights with their adapters merged into them, by peft."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor, nn

from llava_core.model.freeze import is_adapter
from llava_core.model.llava import Llava
from llava_core.weights.load import assign


def merged(outline: Llava, weights: Iterator[Tensor]) -> Iterator[Tensor]:
    """The weights of the model without adapters, in the order of its outline; a merged one in fp32.

    Args:
        outline: of the model with adapters.
        weights: its own, in its order; each is read once.
    """
    named = zip((name for name, _ in outline.named_parameters()), weights, strict=True)
    for layer_name, group in groupby(named, key=lambda item: _adapted_layer(item[0])):
        if layer_name is None:
            yield from (weight for _, weight in group)
            continue
        values = {name.removeprefix(f"{layer_name}."): weight for name, weight in group}
        weight = _merged_weight(outline.get_submodule(layer_name), values)
        yield weight
        yield from (value for name, value in values.items() if name == "base_layer.bias")


def _adapted_layer(name: str) -> str | None:
    """The layer with adapters that a parameter belongs to."""
    if is_adapter(name):
        return name.partition(".lora_")[0]
    module, base, _ = name.partition(".base_layer.")
    return module if base else None


def _merged_weight(layer: nn.Module, values: dict[str, Tensor]) -> Tensor:
    """In fp32, whatever the weight was kept in: it is rounded once, when it is written."""
    from peft.tuners.lora import LoraLayer

    layer = copy.deepcopy(layer)
    assert isinstance(layer, LoraLayer)
    for name, value in values.items():
        assign(layer, name, nn.Parameter(value.to(torch.float32, copy=True), requires_grad=False))
    with torch.no_grad():
        layer.merge()
    weight = layer.get_base_layer().weight
    assert isinstance(weight, Tensor)
    return weight.detach()
