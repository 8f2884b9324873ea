"""Cross entropy. Shapes: logits [N, C], targets [N]."""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_simulator.contract import HALF_AND_FLOAT, require, require_dtype

OP = "npu_cross_entropy_loss"
MAX_ROWS = 200_000


def cross_entropy_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    lse_square_scale_for_zloss: float = 0.0,
    return_zloss: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`npu_cross_entropy_loss`: (loss [1], or [N] for "none"; log probabilities [N, C]; two unused results).

    A negative `ignore_index` means that nothing is ignored, so that a target of −100 is out of range: filter first.
    Class weights and label smoothing are documented, and not simulated.
    """
    _check(input, target, reduction, ignore_index)
    _check_not_simulated(weight, label_smoothing, lse_square_scale_for_zloss, return_zloss)
    log_prob = input.float().log_softmax(-1)
    counted = _counted(target, ignore_index)
    losses = -log_prob.gather(1, target[:, None])[:, 0] * counted
    total = losses.sum().view(1)
    loss = {"none": losses, "sum": total, "mean": total / counted.sum()}[reduction]
    # The results that are not enabled: their shapes are those of torch_npu's own shape function.
    unused = torch.zeros_like(loss).to(input.dtype)
    return loss.to(input.dtype), log_prob.to(input.dtype), unused, torch.zeros_like(losses).to(input.dtype)


def cross_entropy_loss_backward(
    grad_loss: Tensor,
    log_prob: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    grad_zloss: Tensor | None = None,
    lse_for_zloss: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    lse_square_scale_for_zloss: float = 0.0,
) -> Tensor:
    """`npu_cross_entropy_loss_backward`: the logits' gradient, in log_prob's dtype."""
    _check(log_prob, target, reduction, ignore_index)
    _check_not_simulated(weight, label_smoothing, lse_square_scale_for_zloss, False)
    if reduction == "mean":
        rule = "with a gradient, reduction 'mean' allows only the defaults of the other arguments"
        require(ignore_index == -100, OP, rule, f"ignore_index={ignore_index}")
    counted = _counted(target, ignore_index)
    grad = log_prob.float().exp()
    grad.scatter_add_(1, target[:, None], torch.full_like(grad, -1.0)[:, :1])
    scale = grad_loss.float() / (counted.sum() if reduction == "mean" else 1)
    return (grad * (counted * scale)[:, None]).to(log_prob.dtype)


def _counted(target: Tensor, ignore_index: int) -> Tensor:
    """1.0 for each row that counts."""
    return (target != ignore_index).float() if ignore_index >= 0 else torch.ones_like(target, dtype=torch.float32)


def _check(logits: Tensor, target: Tensor, reduction: str, ignore_index: int) -> None:
    require_dtype(OP, "input", logits, HALF_AND_FLOAT)
    require_dtype(OP, "target", target, (torch.int64,))
    require(logits.dim() == 2, OP, "input is [N, C]", f"shape {tuple(logits.shape)}")
    num_rows, num_classes = logits.shape
    require(target.shape == (num_rows,), OP, f"target is [{num_rows}]", f"shape {tuple(target.shape)}")
    require(0 < num_rows <= MAX_ROWS, OP, f"N is from 1 to {MAX_ROWS}", num_rows)
    require(reduction in ("mean", "sum", "none"), OP, "reduction is 'mean', 'sum' or 'none'", repr(reduction))
    require(ignore_index < num_classes, OP, f"ignore_index is below {num_classes}", ignore_index)
    lowest, highest = int(target.min()), int(target.max())
    require(
        lowest >= 0 and highest < num_classes,
        OP,
        f"targets lie in [0, {num_classes}), and a negative ignore_index ignores nothing: filter such rows first",
        f"targets from {lowest} to {highest}",
    )


def _check_not_simulated(weight: Tensor | None, smoothing: float, zloss_scale: float, return_zloss: bool) -> None:
    require(weight is None, OP, "class weights are not simulated", "weight=…")
    require(smoothing == 0.0, OP, "label smoothing is not simulated", smoothing)
    require(zloss_scale == 0.0 and not return_zloss, OP, "the z-loss is documented as not enabled", zloss_scale)
