"""What Ascend's chips can do, as plain functions of a chip's name; and which chip is here."""

from __future__ import annotations

import torch

from llava_core.backend import PrecisionCaps

FIRST_GENERATION = frozenset(
    {"Ascend910", "Ascend910A", "Ascend910ProA", "Ascend910PremiumA", "Ascend910B", "Ascend910ProB"}
)
"""Training chips before Atlas A2, whose names (Ascend910B1 to B4) only look like one of these."""

INFERENCE = "Ascend310"
"""How the names of the chips for inference begin."""


def soc_name() -> str | None:
    """torch_npu's name of the first visible chip, e.g. `Ascend910B2`; None where there is none. Opens no device."""
    module = getattr(torch, "npu", None)
    if module is None or not module.device_count():
        return None
    name = module.get_device_name(0)
    assert isinstance(name, str)
    return name


def is_first_generation(soc: str) -> bool:
    """Whether the chip is none of Atlas A2 and later: no bf16, few of the fused ops, fp16 that saturates."""
    return soc in FIRST_GENERATION or soc.startswith(INFERENCE)


def precision_caps(soc: str | None) -> PrecisionCaps:
    """The dtypes that a chip computes in."""
    if soc is None:
        return PrecisionCaps(frozenset({torch.float32}), torch.float32, "no device to ask")
    if is_first_generation(soc):
        # fp16 is left out: its sums saturate at 65504 there, so that neither a loss scale nor a check for infinity
        # sees that they overflowed (torch_npu's `is_support_inf_nan`).
        reason = f"{soc} has no bf16, and its fp16 saturates where a loss scale needs infinity"
        return PrecisionCaps(frozenset({torch.float32}), torch.float32, reason)
    compute = frozenset({torch.float32, torch.bfloat16, torch.float16})
    return PrecisionCaps(compute, torch.bfloat16, f"{soc} multiplies bf16 in hardware")
