"""Ops whose torch_npu implementation calls CANN without passing the dispatcher, composed of ops that do pass it."""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_simulator.kernels import build_kernel
from ascend_simulator.reference.optimizer import fused_adamw


def install_overrides(aten: torch.library.Library, soc_name: str) -> None:
    """Registers the replacements."""
    backward = torch.ops.aten.matmul_backward.default
    aten.impl("matmul_backward", build_kernel(backward, matmul_backward, soc_name), "PrivateUse1", allow_override=True)
    adamw = torch.ops.aten._fused_adamw_.default
    aten.impl("_fused_adamw_", build_kernel(adamw, fused_adamw, soc_name), "PrivateUse1", allow_override=True)
    for key in ("PrivateUse1", "AutogradPrivateUse1"):
        aten.impl("scaled_dot_product_attention", scaled_dot_product_attention, key, allow_override=True)
        aten.impl("softmax.int", softmax, key, allow_override=True)


def matmul_backward(grad: Tensor, left: Tensor, right: Tensor, mask: list[bool]) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `left @ right`; torch_npu's autograd of matmul calls this, and torch has no host kernel for it."""
    left_shape, right_shape = left.shape, right.shape
    if left.dim() == 1:
        left, grad = left.unsqueeze(0), grad.unsqueeze(-1 if right.dim() == 1 else -2)
    if right.dim() == 1:
        right, grad = right.unsqueeze(-1), grad.unsqueeze(-1)
    if left.dim() > 2 and right.dim() == 2:
        # One product over all rows, as torch's own backward of a linear layer: also the same rounding.
        left, grad = left.flatten(0, -2), grad.flatten(0, -2)
    left_grad = (grad @ right.mT).sum_to_size(left.shape).reshape(left_shape) if mask[0] else None
    right_grad = (left.mT @ grad).sum_to_size(right.shape).reshape(right_shape) if mask[1] else None
    return left_grad, right_grad


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's plain formula: torch_npu's calls aclnn directly."""
    return torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]


def softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """torch's own composition: torch_npu's looks for aclnnSoftmax first, and on Ascend 950 accepts nothing else."""
    return torch.ops.aten._softmax(input if dtype is None else input.to(dtype), dim, False)
