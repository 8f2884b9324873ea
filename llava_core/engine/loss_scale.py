"""Loss scaling for fp16, so that small gradients do not vanish: PyTorch's GradScaler without its float64 on the device,
in which many accelerators do not compute, and without its own wait for the device, for the step's gradient norm already
tells whether anything overflowed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

GROWTH_INTERVAL = 2000
"""Steps without overflow after which a larger scale is tried; this, the start and the factor 2 are GradScaler's."""


@dataclass
class LossScale:
    """The factor of the loss, always a power of two, so that it changes no bit of what does not overflow.

    Attributes:
        good_steps: since the last change.
    """

    scale: float = 2.0**16
    good_steps: int = 0

    def unscale_(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients by the scale, in place."""
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(1 / self.scale)

    def update(self, *, overflowed: bool) -> None:
        """Halve the scale after an overflow; double it after a long time without one."""
        self.good_steps = 0 if overflowed else self.good_steps + 1
        if overflowed:
            self.scale /= 2
        elif self.good_steps == GROWTH_INTERVAL:
            self.scale, self.good_steps = self.scale * 2, 0
