"""Attention by the flash-attn package.

Source: flash-attn 2.8.3, flash_attn/flash_attn_interface.py and csrc/flash_attn/flash_api.cpp. Its causal mask is
aligned at the last query and key, as MaskSpec's is; a query that sees nothing yields zeros.
"""

from __future__ import annotations

import torch
from flash_attn import flash_attn_func, flash_attn_varlen_func
from torch import Tensor

from llava_core.backend import MaskSpec, sdpa
from llava_cuda.lowering import max_length, needs_lowering, window_size


def attention(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, scale: float) -> Tensor:
    """The attention op: packed samples, windows and unequal lengths by flash-attn, other dense rows through SDPA.

    The backward pass follows `torch.use_deterministic_algorithms`, as torch's own flash kernel does.
    """
    options = {
        "softmax_scale": scale,
        "causal": mask.causal,
        "window_size": window_size(mask),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if mask.cu_seqlens is not None:
        length = max_length(mask)
        packed = (x.squeeze(0) for x in (q, k, v))
        return flash_attn_varlen_func(*packed, mask.cu_seqlens, mask.cu_seqlens, length, length, **options).unsqueeze(0)
    if needs_lowering(mask, q.shape[1], k.shape[1]):
        return flash_attn_func(q, k, v, **options)
    return sdpa.dense(q, k, v, mask, scale)
