"""RMSNorm by apex: sums and the weight in fp32, one rounding at the end.

Source: apex (2026-07), apex/normalization/fused_layer_norm.py. Apex imports its extension at the first call; it is
imported here so that a build without it is a reason at selection, not a crash at the first step.
"""

from __future__ import annotations

import fused_layer_norm_cuda as _extension  # type: ignore[import-not-found]
from apex.normalization.fused_layer_norm import fused_rms_norm_affine
from torch import Tensor

assert hasattr(_extension, "rms_forward_affine"), "an apex from before it had RMSNorm (2022)"


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The rms_norm op. The weight is cast first: this entry point takes one dtype for both."""
    return fused_rms_norm_affine(x, weight.to(x.dtype), list(weight.shape), eps)
