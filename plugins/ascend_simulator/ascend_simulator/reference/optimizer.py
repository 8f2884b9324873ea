"""AdamW: torch's fused op, and the one that torch_npu's own NpuFusedAdamW calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ascend_simulator.contract import HALF_AND_FLOAT, require, require_dtype

LISTS = ("self", "grads", "exp_avgs", "exp_avg_sqs")


def fused_adamw(*lists: list[Tensor], **options: Any) -> None:
    """`_fused_adamw_`: torch's own host kernel, after the checks. The learning rate is a number."""
    op = "_fused_adamw_"
    parameters, state_steps = lists[0], lists[5]
    for name, tensors in zip(LISTS, lists, strict=False):
        require(len(tensors) == len(parameters), op, f"{name} has one tensor a parameter", len(tensors))
        for parameter, tensor in zip(parameters, tensors, strict=True):
            require_dtype(op, name, tensor, HALF_AND_FLOAT)
            require(tensor.shape == parameter.shape, op, f"{name} has the parameter's shape", tuple(tensor.shape))
    for step in state_steps:
        require_dtype(op, "state_steps", step, (torch.float32,))
    torch.ops.aten._fused_adamw_.default(*lists, **options)


def apply_adam_w(
    beta1_power: float,
    beta2_power: float,
    lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    grad: Tensor,
    max_grad_norm: Tensor | None,
    amsgrad: bool | None,
    maximize: bool | None,
    *,
    out: list[Tensor],
) -> list[Tensor]:
    """`npu_apply_adam_w.out`: one step in place on out = (parameter, first moment, second moment).

    `beta1_power` and `beta2_power` are those of the step before.
    """
    op = "npu_apply_adam_w"
    require(not amsgrad and max_grad_norm is None, op, "amsgrad is not simulated", "amsgrad=True")
    parameter, exp_avg, exp_avg_sq = out
    signed = -grad if maximize else grad
    exp_avg.mul_(beta1).add_(signed, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(signed, signed, value=1 - beta2)
    first = exp_avg / (1 - beta1_power * beta1)
    second = exp_avg_sq / (1 - beta2_power * beta2)
    parameter.mul_(1 - lr * weight_decay).addcdiv_(first, second.sqrt() + epsilon, value=-lr)
    return out
