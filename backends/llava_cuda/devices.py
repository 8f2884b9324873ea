"""What NVIDIA's devices can do, as plain functions of a compute capability or a device name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeAlias

import torch

from llava_core.backend import PrecisionCaps

Capability: TypeAlias = tuple[int, int]
"""CUDA's compute capability, e.g. (9, 0)."""

VOLTA: Capability = (7, 0)
AMPERE: Capability = (8, 0)


def capability() -> Capability | None:
    """The current device's compute capability; None where torch can use no device. Opens it: not for `probe`."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def precision_caps(found: Capability | None) -> PrecisionCaps:
    """The dtypes that a device of this capability computes in."""
    if found is None:
        return PrecisionCaps(frozenset({torch.float32}), torch.float32, "no CUDA device to ask")
    label = f"compute capability {found[0]}.{found[1]}"
    if found >= AMPERE:
        compute = frozenset({torch.float32, torch.bfloat16, torch.float16})
        return PrecisionCaps(compute, torch.bfloat16, f"{label} multiplies bf16 in hardware")
    # fp16 is there to be asked for: its narrow range needs a loss scale, and steps are lost where it overflows.
    compute = frozenset({torch.float32, torch.float16})
    return PrecisionCaps(compute, torch.float32, f"{label} has no bf16 in hardware (8.0 and up have)")


def _peaks(half: float, full: float, *, bf16: bool = True) -> Mapping[torch.dtype, float]:
    """TFLOP/s with fp32 accumulation and without sparsity; `full` is fp32 proper, not TF32, which is never used."""
    peaks = {torch.float16: half * 1e12, torch.float32: full * 1e12}
    return peaks | {torch.bfloat16: half * 1e12} if bf16 else peaks


_PEAKS: tuple[tuple[str, Mapping[torch.dtype, float]], ...] = (
    # Names as the driver gives them; the first match counts. From NVIDIA's datasheet of each product, which often
    # prints the figure with sparsity: those are halved here.
    (r"\bB200\b", _peaks(2250, 75)),  # HGX B200
    (r"\bH200 NVL\b", _peaks(835.5, 60)),
    (r"\bH200\b", _peaks(989.5, 67)),  # SXM
    (r"\bH100 NVL\b", _peaks(835.5, 60)),
    (r"\bH100 PCIe\b", _peaks(756.5, 51)),
    (r"\bH100\b", _peaks(989.5, 67)),  # SXM: "NVIDIA H100 80GB HBM3"
    (r"\bA100\b", _peaks(312, 19.5)),
    (r"\bL40S\b", _peaks(362.05, 91.6)),
    (r"\bL40\b", _peaks(181.05, 90.5)),
    (r"\bL4\b", _peaks(121, 30.3)),
    (r"\bA40\b", _peaks(149.7, 37.4)),
    (r"\bA30\b", _peaks(165, 10.3)),
    (r"\bA10\b", _peaks(125, 31.2)),
    (r"\bRTX A6000\b", _peaks(154.8, 38.7)),
    (r"\bRTX 4090$", _peaks(165.2, 82.6)),  # Ada whitepaper; the 4090 D and the laptop chip are others
    (r"\bRTX 3090$", _peaks(71, 35.6)),  # GA102 whitepaper
    (r"\bV100-SXM2\b", _peaks(125, 15.7, bf16=False)),
    (r"\bT4\b", _peaks(65, 8.1, bf16=False)),
)


def peak_flops(device_name: str) -> Mapping[torch.dtype, float]:
    """The dense matmul peak in FLOP/s by dtype; empty for a device that the table does not know, or a slice of one."""
    if "MIG" in device_name:
        return {}
    return next((peaks for pattern, peaks in _PEAKS if re.search(pattern, device_name)), {})
