"""What Ascend's chips can do, as plain functions of a chip's name; and which chip is here."""

from __future__ import annotations

import re

import torch

from llava_core.backend import PrecisionCaps

SECOND_GENERATION = re.compile(r"Ascend(910B\d|910_93|950)")
"""Atlas A2 (Ascend910B1 to B4), Atlas A3 and Ascend 950, by torch_npu's names. Plain Ascend910B is an older chip."""


def soc_name() -> str | None:
    """torch_npu's name of the first visible chip, e.g. `Ascend910B2`; None where there is none. Opens no device."""
    module = getattr(torch, "npu", None)
    if module is None or not module.device_count():
        return None
    name = module.get_device_name(0)
    assert isinstance(name, str)
    return name


def is_second_generation(soc: str) -> bool:
    """Whether the chip is of Atlas A2 or later: it has bf16, the fused ops, and fp16 that overflows to infinity."""
    return SECOND_GENERATION.match(soc) is not None


def precision_caps(soc: str | None) -> PrecisionCaps:
    """The dtypes that a chip computes in."""
    if soc is None:
        return PrecisionCaps(frozenset({torch.float32}), torch.float32, "no device to ask")
    if not is_second_generation(soc):
        # fp16 is left out: its sums saturate at 65504 there, so that neither a loss scale nor a check for infinity
        # sees that they overflowed (torch_npu's `is_support_inf_nan`).
        reason = f"{soc} is none of Atlas A2 and later: no bf16, and fp16 saturates where a loss scale needs infinity"
        return PrecisionCaps(frozenset({torch.float32}), torch.float32, reason)
    compute = frozenset({torch.float32, torch.bfloat16, torch.float16})
    return PrecisionCaps(compute, torch.bfloat16, f"{soc} multiplies bf16 in hardware")
