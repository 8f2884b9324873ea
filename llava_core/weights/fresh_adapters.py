"""What adapters start from: peft's own initialisation, the same whatever process asks for which of them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from llava_core.weights.rows import Sliceable


def fresh_adapters(
    wanted: Sequence[tuple[str, torch.Size]], weights: Mapping[str, Callable[[], Sliceable]], seed: int
) -> dict[str, Callable[[], Sliceable]]:
    """A loader for each adapter's parameter: a random A, a B of zeros, and for DoRA the norms of the weight's rows.

    Args:
        wanted: names and shapes.
        weights: loaders of the model's weights, by their plain names.
        seed: with a parameter's name it decides its values.
    """
    found: dict[str, Callable[[], Sliceable]] = {}
    for name, shape in wanted:
        module, _, kind = name.partition(".lora_")
        if kind.startswith("A."):
            found[name] = partial(_uniform, shape, f"{seed} {name}")
        elif kind.startswith("B."):
            found[name] = partial(torch.zeros, shape)
        else:
            found[name] = partial(_row_norms, weights[f"{module}.weight"])
    return found


def _uniform(shape: torch.Size, seed: str) -> Tensor:
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big"))
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)


def _row_norms(load: Callable[[], Sliceable]) -> Tensor:
    return torch.linalg.norm(load()[:, :].float(), dim=1)
