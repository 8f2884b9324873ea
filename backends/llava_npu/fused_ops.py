"""torch_npu's fused norm, rotary embedding, activation and loss. Each sums in fp32 and rounds once, at the end.

Source: torch_npu 2.13.0, `_op_plugin_docs.py`; op-plugin and CANN's pages of the aclnn functions under them (2026-08).
Shapes: B rows, T tokens, N query heads, G key/value heads, H head dim, D width, K supervised positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch_npu
from torch import Tensor
from torch.autograd.function import once_differentiable

from llava_core.backend import reference
from llava_core.backend.reference import at_least_fp32

MAX_LOSS_ROWS = 200_000
"""Rows of one `npu_cross_entropy_loss`."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The rms_norm op. Multiplies by the weight before it rounds, where Llama rounds before and after.

    The weight is cast first: one dtype for both is what all chips take.
    """
    out: Tensor = torch_npu.npu_rms_norm(x, weight.to(x.dtype), epsilon=eps)[0]
    return out


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The rotary op, in the kernel's half-split mode.

    The rows become one long sequence [1, B·T, N, H] with tables [1, B·T, 1, H]: the kernel takes fewer than 1000 rows.
    It asks for |cos|, |sin| ≤ 1, which no request tells: `rotary_angles` of llava_core/model/decoder.py makes plain
    cosines and sines, and `RopeSpec` knows no kind that scales them (as YaRN's attention factor does).
    """
    cos, sin = (t.expand(q.shape[0], -1, -1).reshape(1, -1, 1, t.shape[-1]) for t in (cos, sin))
    rows = (x.reshape(1, -1, *x.shape[2:]) for x in (q, k))
    new_q, new_k = (_Rotation.apply(x, cos, sin) for x in rows)
    return new_q.reshape(q.shape), new_k.reshape(k.shape)


class _Rotation(torch.autograd.Function):
    """npu_rotary_mul, without keeping its input: its own autograd does, for gradients of the tables."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        out: Tensor = torch_npu.npu_rotary_mul(x, cos, sin)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        # The transpose of a rotation is the one back. The sine moves to the other half with what it multiplied; where
        # both halves are alike, as in Llama, that changes nothing.
        return torch_npu.npu_rotary_mul(grad, cos, -sin.roll(sin.shape[-1] // 2, dims=-1)), None, None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The swiglu op: the kernel takes both halves in one tensor, the gate first."""
    if gate.numel() == 0:
        # It refuses empty tensors; the last layer runs on no position where a batch has no labels.
        return reference.swiglu(gate, up)
    out: Tensor = torch_npu.npu_swiglu(torch.cat((gate, up), dim=-1))
    if out.requires_grad:
        # aclnnSwiGluGrad takes contiguous gradients only; nothing is copied where they are.
        out.register_hook(Tensor.contiguous)
    return out


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The linear_cross_entropy op. Keeps every label's log probabilities in fp32 for the backward pass."""
    if targets.numel() == 0:
        return reference.linear_cross_entropy(hidden, weight, targets, weights)  # the kernel refuses empty tensors
    logits = hidden @ weight.T
    logits = logits.to(at_least_fp32(logits.dtype))
    # "none": with a gradient, "mean" allows no other argument, and each label has its own weight here.
    parts = zip(logits.split(MAX_LOSS_ROWS), targets.split(MAX_LOSS_ROWS), strict=True)
    losses = torch.cat([torch_npu.npu_cross_entropy_loss(x, t, reduction="none")[0] for x, t in parts])
    return (losses * weights).sum()
