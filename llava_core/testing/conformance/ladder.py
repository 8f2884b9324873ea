"""A tiny LLaVA on the backend beside the same on the host: layers, the first step, training, checkpoints.

The host runs the reference ops in float64, which settles what is right. Every rung uses the same batches.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from llava_core.engine.parts import local_parts
from llava_core.engine.torch_engine import StepResult
from llava_core.testing.conformance.check import Check, CheckFailed, CheckSkipped
from llava_core.testing.conformance.ladder_model import Ladder, build_ladder
from llava_core.testing.conformance.subject import Subject, dtype_name
from llava_core.train.checkpoint import open_newest, save_state
from llava_core.train.stored import Checkpoint

STEPS = 20
HANDOVER = 3
"""Steps before a checkpoint changes hands, and after."""

ACTIVATION_MULTIPLE = 3.0
"""A layer's largest error may be this multiple of the host's own in the same dtype, as each kernel's may
(`Op.error_multiple`). Measured between kernels of one device: 1.2."""

FIRST_LOSS_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-3}
"""Relative, of the first step's loss. fp32 adds some hundred terms, each off by 6e-8; bf16 rounds each activation by up
to 4e-3, and the loss is a mean over some dozens of labels. The host's own: 1e-7 and 2e-4."""

NORM_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3}
"""Relative, of the first step's gradient norm: one number out of all gradients. The host's own: 1e-7 and 5e-4."""

LOSS_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Relative, of each step's loss. AdamW divides by a root of what it has seen, so that early on a weight's step is as
long as its rate whatever its gradient is, and roundings of small gradients grow. The host's own over twenty steps: 2e-7
and 3e-3; products in TF32 are above 1e-4."""


def checks(subject: Subject) -> Iterator[Check]:
    """The rungs, in each dtype that trains without a loss scale; fp16 is compared layer by layer alone."""
    runs = Runs(subject)
    rungs = {
        "ladder.first_step": ("loss and gradient norm of the first step are the host's", runs.check_first_step),
        "ladder.training": (f"each of {STEPS} steps has the host's loss", runs.check_training),
    }
    layers = "each layer's output is as near to float64 as the host's in the same dtype"
    for dtype in subject.dtypes:
        yield Check("ladder.activations", dtype_name(dtype), layers, partial(runs.check_activations, dtype))
        if dtype in LOSS_TOLERANCE:
            for name, (explanation, run) in rungs.items():
                yield Check(name, dtype_name(dtype), explanation, partial(run, dtype))
    there = "a state saved on the host goes on here: same bits loaded, same losses after"
    back = "a state saved here goes on on the host: same bits loaded, same losses after"
    yield Check("ladder.checkpoint_to_backend", "", there, partial(runs.check_checkpoint, to_backend=True))
    yield Check("ladder.checkpoint_to_host", "", back, partial(runs.check_checkpoint, to_backend=False))


class Runs:
    """What several rungs share: the exact run on the host, and the backend's in each dtype."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._results: dict[torch.dtype, list[StepResult]] = {}

    @cached_property
    def exact(self) -> list[StepResult]:
        """Every step on the host, in float64."""
        ladder = build_ladder(self.subject.host_hardware, torch.float64, reference=True)
        return [ladder.step(number) for number in range(STEPS)]

    def results(self, dtype: torch.dtype) -> list[StepResult]:
        """Every step on the backend."""
        if dtype not in self._results:
            ladder = build_ladder(self.subject.hardware, dtype)
            self._results[dtype] = [ladder.step(number) for number in range(STEPS)]
        return self._results[dtype]

    def check_activations(self, dtype: torch.dtype) -> str:
        """Names the first layer that is off."""
        host = self.subject.host_hardware
        exact = build_ladder(host, torch.float64, reference=True).activations()
        standard = build_ladder(host, dtype, reference=True).activations()
        found = build_ladder(self.subject.hardware, dtype).activations()
        worst = 0.0
        for name, truth in exact.items():
            scale = float(truth.abs().max())
            allowed = ACTIVATION_MULTIPLE * _error(standard[name], truth) + scale * torch.finfo(dtype).eps
            error = _error(found[name], truth)
            if not error <= allowed:
                raise CheckFailed(f"the first layer that differs is {name}: off by {error:.3g}, allowed {allowed:.3g}")
            worst = max(worst, error / allowed)
        return f"{len(exact)} layers, at most {worst:.2f} of the allowed error"

    def check_first_step(self, dtype: torch.dtype) -> str:
        found, exact = self.results(dtype)[0], self.exact[0]
        _expect_near("the loss", found.loss, exact.loss, FIRST_LOSS_TOLERANCE[dtype])
        _expect_near("the gradient norm", found.grad_norm, exact.grad_norm, NORM_TOLERANCE[dtype])
        return f"loss {found.loss:.6f}, gradient norm {found.grad_norm:.6f}"

    def check_training(self, dtype: torch.dtype) -> str:
        found, exact = ([r.loss for r in run] for run in (self.results(dtype), self.exact))
        off = _expect_losses(found, exact, LOSS_TOLERANCE[dtype])
        if not found[-1] < found[0]:
            raise CheckFailed(f"the loss did not fall: {found[0]:.4f} to {found[-1]:.4f}")
        return f"off by at most {off:.1e}; the loss falls from {found[0]:.3f} to {found[-1]:.3f}"

    def check_checkpoint(self, *, to_backend: bool) -> str:
        dtype = next((d for d in self.subject.dtypes if d in LOSS_TOLERANCE), None)
        if dtype is None:
            raise CheckSkipped("the backend computes in neither float32 nor bfloat16")
        ends = [self.subject.host_hardware, self.subject.hardware]
        first, second = (build_ladder(end, dtype) for end in (ends if to_backend else reversed(ends)))
        for number in range(HANDOVER):
            first.step(number)
        tensors, state = first.engine.state()
        with tempfile.TemporaryDirectory() as folder:
            save_state(Path(folder), HANDOVER, local_parts(tensors), state, keep=None)
            loaded, _ = open_newest(Path(folder))
            assert loaded is not None
            rng = second.engine.hardware.backend.rng
            before = {name: value.clone() for name, value in rng.state().items()}
            try:
                second.engine.load_state(loaded, loaded.state)
                _expect_same_state(second, loaded)
            finally:
                rng.load_state(before)
        steps = range(HANDOVER, 2 * HANDOVER)
        found, expected = ([ladder.step(number).loss for number in steps] for ladder in (second, first))
        off = _expect_losses(found, expected, LOSS_TOLERANCE[dtype])
        return f"{len(loaded.tensors)} tensors; losses after it off by at most {off:.1e}"


def _expect_same_state(ladder: Ladder, saved: Checkpoint) -> None:
    """Weights and moments, bit for bit. Random states differ in kind from hardware to hardware."""
    tensors, _ = ladder.engine.state()
    for name in saved.tensors:
        if name.startswith("rng."):
            continue
        if name not in tensors:
            raise CheckFailed(f"{name} does not return from the checkpoint")
        if not torch.equal(tensors[name].cpu(), saved.read(name)):
            raise CheckFailed(f"{name} does not return from the checkpoint with its bits")


def _expect_losses(found: Sequence[float], exact: Sequence[float], tolerance: float) -> float:
    for number, (loss, expected) in enumerate(zip(found, exact, strict=True), start=1):
        _expect_near(f"the loss of step {number}", loss, expected, tolerance)
    return max(abs(a - b) / abs(b) for a, b in zip(found, exact, strict=True))


def _expect_near(what: str, found: float, expected: float, tolerance: float) -> None:
    if not abs(found - expected) <= tolerance * abs(expected):
        off = abs(found - expected) / abs(expected)
        raise CheckFailed(f"{what} is {found:.8g}, on the host {expected:.8g}: off by {off:.2g}, allowed {tolerance:g}")


def _error(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).abs().max())
