"""Attention by `npu_fusion_attention`, Ascend's flash attention: no scores in memory, grouped heads without copies.

`lowering` has its conventions. The docs call the op "for training only"; torch_npu's own SDPA runs it with and without
gradients (op-plugin, ScaledDotProductAttentionKernelNpuOpApi.cpp), and so does this: the forward pass is the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch_npu
from torch import Tensor

from llava_core.backend import MaskSpec
from llava_npu.lowering import dense_arguments, pattern, sequence_groups


def attention(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, scale: float) -> Tensor:
    """The attention op: dense rows in one call, packed samples in one call for each 1024 of them."""
    if mask.cu_seqlens is not None:
        return _packed(q, k, v, mask, scale)
    arguments, blind = dense_arguments(mask, q.shape[1], k.shape[1], q.device)
    out = _fusion(q, k, v, "BSND", scale, arguments)
    return out if blind is None else out.masked_fill(blind, 0.0)


def _packed(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, scale: float) -> Tensor:
    masking, outputs = pattern(mask, q.device), []
    for tokens, ends in sequence_groups(mask):
        lengths = {"actual_seq_qlen": ends, "actual_seq_kvlen": ends}
        samples = q[0, tokens], k[0, tokens], v[0, tokens]
        outputs.append(_fusion(*samples, "TND", scale, masking | lengths))
    return torch.cat(outputs).unsqueeze(0) if len(outputs) > 1 else outputs[0].unsqueeze(0)


def _fusion(q: Tensor, k: Tensor, v: Tensor, layout: str, scale: float, arguments: dict[str, Any]) -> Tensor:
    # The scale is always passed: its default is 1, not 1/√H.
    out: Tensor = torch_npu.npu_fusion_attention(q, k, v, q.shape[-2], layout, scale=scale, **arguments)[0]
    return out
