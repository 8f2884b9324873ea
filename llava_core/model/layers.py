"""Layers with one rule of precision: a weight is cast to the dtype of the activations that meet it.

Trained weights are kept in fp32 and frozen ones in the compute dtype; the cast of the latter is free. Where a sharding
engine hands over weights in the compute dtype already, the cast is free too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_core.backend import OpSet
from llava_core.errors import ConfigError


class Linear(nn.Linear):
    """y = x Wᵀ + b in x's dtype."""

    cast: Callable[[Tensor, torch.dtype], Tensor] = staticmethod(Tensor.to)
    """How the weight is cast; an engine that forgets casts until the backward pass sets another."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.cast(self.weight, x.dtype), bias)


class LayerNorm(nn.LayerNorm):
    """Layer norm in x's dtype (PyTorch accumulates in fp32)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class RmsNorm(nn.Module):
    """Root-mean-square norm over the last dim. Source: arXiv:1910.07467, equation 4."""

    def __init__(self, width: int, eps: float, ops: OpSet) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)


def quick_gelu(x: Tensor) -> Tensor:
    """x · sigmoid(1.702 x), the approximation that CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The vision tower's activation by its Hugging Face name.

    Raises:
        ConfigError: a name that is not known.
    """
    if name not in ACTIVATIONS:
        raise ConfigError(f"activation {name!r} is not known; there are: {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]
