"""The loss scale does bit for bit what PyTorch's GradScaler does."""

from __future__ import annotations

import torch

from llava_core.engine.loss_scale import GROWTH_INTERVAL, LossScale

OVERFLOWS = {0, 1, 7, 500}


def gradient(step: int) -> torch.Tensor:
    """A gradient of the unscaled loss; infinite at some steps."""
    value = torch.sin(torch.arange(3.0) + step)
    return value * torch.inf if step in OVERFLOWS else value


def test_scales_and_updates_are_those_of_pytorchs_grad_scaler() -> None:
    """Through overflows, backing off, and one growth."""
    theirs, ours = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizers = [torch.optim.AdamW([parameter], lr=0.01) for parameter in (theirs, ours)]
    scaler, loss_scale = torch.amp.GradScaler("cpu"), LossScale()
    for step in range(GROWTH_INTERVAL + 510):
        scaler.scale(theirs @ gradient(step)).backward()
        scaler.step(optimizers[0])
        scaler.update()
        (ours @ gradient(step) * loss_scale.scale).backward()
        loss_scale.unscale_([ours])
        overflowed = not bool(ours.grad.isfinite().all())
        if not overflowed:
            optimizers[1].step()
        loss_scale.update(overflowed=overflowed)
        for optimizer in optimizers:
            optimizer.zero_grad()
        assert loss_scale.scale == scaler.get_scale()
        assert torch.equal(ours, theirs)
    assert loss_scale.scale == 2.0 ** (16 - len(OVERFLOWS) + 1)
