"""Cases beside the catalogue's, on which sums kept in a narrow dtype go plainly wrong: terms that are rounded away, and
squares that overflow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from llava_core.backend import MaskSpec
from llava_core.backend.ops import Case

KEYS = 1100
"""Added up one by one in fp16, terms of 1/1100 become 1/1024 from a half on: 4 % too much. It is no power of two, whose
terms would be exact."""

CLASSES = 3000
"""As many terms of nearly one, none above it, come to 256 in bf16 and to 2048 in fp16: one more is rounded away."""


def _mean_of_keys(generator: torch.Generator) -> tuple[Any, ...]:
    """Queries and keys that are nearly alike weight every value alike; values near one add up to one."""
    q, k, v = (torch.randn(1, KEYS, heads, 32, generator=generator, dtype=torch.float64) for heads in (2, 1, 1))
    return 0.01 * q, 0.01 * k, 1 + 0.1 * v, MaskSpec.dense(causal=False), 32**-0.5


def _large_rows(generator: torch.Generator) -> tuple[Any, ...]:
    """Values whose squares are above fp16's largest number, 65504."""
    x = 400 * torch.randn(3, 512, generator=generator, dtype=torch.float64)
    return x, 1 + 0.1 * torch.randn(512, generator=generator, dtype=torch.float64), 1e-5


def _many_classes(generator: torch.Generator) -> tuple[Any, ...]:
    """Logits near zero: the total is the number of classes."""
    hidden = torch.randn(5, 32, generator=generator, dtype=torch.float64)
    weight = 0.01 * torch.randn(CLASSES, 32, generator=generator, dtype=torch.float64)
    return hidden, weight, torch.arange(5) * 599, torch.full((5,), 0.2)


_ATTENTION = {
    "head_dim": 32,
    "num_heads": 2,
    "num_kv_heads": 1,
    "masks": (MaskSpec.dense(causal=False).facts(),),
    "max_length": KEYS,
}

STRESS: Mapping[str, Case] = {
    "attention": Case("mean_of_keys", _mean_of_keys, (0, 1, 2), _ATTENTION),
    "rms_norm": Case("large_rows", _large_rows, (0, 1), {}),
    "linear_cross_entropy": Case("many_classes", _many_classes, (0, 1), {}),
}
"""By op; the other ops add nothing up."""
