"""RMSNorm by the vendor's kernel, for which PyTorch's stands in."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The rms_norm op: x [..., D], weight [D]. Sums are kept in fp32."""
    # VENDOR: your kernel. The weight may be fp32 where x is bf16: cast it if the kernel takes one dtype for both.
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
