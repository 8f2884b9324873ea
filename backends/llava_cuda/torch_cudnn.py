"""Attention by cuDNN and nothing else, through SDPA.

Source: torch 2.13's ATen/native/transformers/cuda/sdp_utils.cpp, `can_use_cudnn_attention`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from llava_core.backend import MaskSpec, sdpa

CUDNN_9 = 90000

if not torch.backends.cudnn.is_available() or (torch.backends.cudnn.version() or 0) < CUDNN_9:
    # A reason at selection; SDPA would only find out at the first step.
    raise ImportError(f"torch {torch.__version__} has no cuDNN 9 to compute attention with")


def attention(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, scale: float) -> Tensor:
    """The attention op over cuDNN's dense kernel; packed samples one by one, or as rows where their lengths agree."""
    return sdpa.attention(q, k, v, mask, scale, dense=_dense)


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, scale: float) -> Tensor:
    if k.shape[1] == 1:
        # cuDNN refuses a single key, which a packed sample of one token is; SDPA gives that one to another kernel.
        return sdpa.dense(q, k, v, mask, scale)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa.dense(q, k, v, mask, scale)
