"""The training step on PyTorch: forward and backward over a step's micro-batches, then one update."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from llava_core.data.batch import Batch, Labelled
from llava_core.engine.context import own_labels
from llava_core.engine.hardware import Hardware
from llava_core.engine.loss import LossMode, label_weights
from llava_core.engine.loss_scale import LossScale
from llava_core.engine.mesh import Mesh
from llava_core.engine.norm import clip_gradients, global_norm
from llava_core.engine.optimizer import build_optimizer, parameter_groups
from llava_core.engine.parts import Facts
from llava_core.engine.pipeline import MicroBatch, Pipeline
from llava_core.engine.shard import free_gathered, sum_gradients_now
from llava_core.engine.state import Stored, collect, restore
from llava_core.errors import TrainingError
from llava_core.model.llava import Llava
from llava_core.weights.load import outline

MIN_LOSS_SCALE = 1.0
"""An fp16 loss scale below this means that gradients overflow whatever the scale: the run has diverged."""


@dataclass(frozen=True)
class OptimizerSettings:
    """What the optimizer is built from.

    Attributes:
        learning_rates: the peak of each part that learns.
        clip_norm: largest global gradient norm; None for no limit.
        on_host: parameters and gradients are kept in the host's memory, wherever the model computes.
    """

    learning_rates: Mapping[str, float]
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    clip_norm: float | None
    on_host: bool = False


@dataclass(frozen=True)
class StepResult:
    """One optimizer step.

    Attributes:
        loss: the step's loss, before the update.
        grad_norm: global gradient norm, before clipping.
        skipped: the gradients overflowed fp16; nothing was updated, and the loss scale was lowered.
    """

    loss: float
    grad_norm: float
    skipped: bool = False


class TorchEngine:
    """A model and its optimizer: whole on one device, or this process's part of them where there is a mesh.

    Attributes:
        model: the first of `stages`.
        stages: what this process has of a pipeline; without one the model alone.
        trained: the parameters that learn here, by name.
    """

    def __init__(
        self,
        model: Llava,
        hardware: Hardware,
        settings: OptimizerSettings,
        loss: LossMode,
        mesh: Mesh | None = None,
        pipeline: Pipeline | None = None,
    ) -> None:
        self.model = model
        self.stages = (model,) if pipeline is None else tuple(pipeline.stages)
        self.pipeline = pipeline
        self.hardware = hardware
        self.mesh = mesh
        self.loss = loss
        self.clip_norm = settings.clip_norm
        self._trained_parts = settings.learning_rates.keys()
        self.trained = {n: p for stage in self.stages for n, p in stage.named_parameters() if p.requires_grad}
        groups = parameter_groups(self.trained.items(), settings.learning_rates, settings.weight_decay)
        self.optimizer = build_optimizer(
            hardware.backend, groups, settings.betas, settings.eps, on_host=settings.on_host
        )
        self.loss_scale = LossScale() if model.compute_dtype == torch.float16 else None

    def step(
        self, batches: Sequence[Batch], learning_rate_scale: float, labelled: Labelled | None = None
    ) -> StepResult:
        """Train on one step's micro-batches, at this share of each part's peak learning rate.

        Args:
            labelled: of the whole step, where other processes have micro-batches of it, as many as there are here.

        Raises:
            TrainingError: the loss or the gradient is not finite; the weights are as they were before the step.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * learning_rate_scale
        loss = self._accumulate(batches, labelled or Labelled.of(batches))
        if self.loss_scale is not None:
            self.loss_scale.unscale_(self.trained.values())
        grad_norm = self._clip()
        # The host waits for the device: whether to update must be known before updating.
        result = StepResult(float(loss), float(grad_norm))
        overflowed = not math.isfinite(result.grad_norm)
        if not math.isfinite(result.loss) or (overflowed and self.loss_scale is None):
            self.optimizer.zero_grad()
            raise TrainingError(self._describe_failure(result, batches))
        if not overflowed:
            self.optimizer.step()
        self.optimizer.zero_grad()
        if self.loss_scale is not None:
            self.loss_scale.update(overflowed=overflowed)
            check_scale(self.loss_scale)
        return replace(result, skipped=overflowed)

    def evaluate(self, batches: Sequence[Batch], labelled: Labelled | None = None) -> float:
        """The mean loss of the labelled tokens of these micro-batches, whatever the loss mode. It keeps nothing for a
        backward pass, draws no random number and leaves everything as it was.

        Args:
            labelled: as `step` takes it.
        """
        micro_batches = self._weighted("token_mean", batches, labelled or Labelled.of(batches))
        with evaluating(self.stages):
            total = self._forward(micro_batches) if self.pipeline is None else self.pipeline.forward(micro_batches)
        if self.mesh is not None:
            self.mesh.sum_losses(total)
        return float(total)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What learns and what the optimizer knows: tensors by logical name, and JSON values. Nothing frozen."""
        return collect(self.trained, self.optimizer, self.hardware.backend.rng, self.loss_scale)

    def load_state(self, stored: Stored, state: Mapping[str, Any]) -> None:
        """Return to a state, bit for bit.

        Raises:
            CheckpointError: it belongs to another model or another choice of trainable parts.
        """
        model = self.model
        whole = outline(model.spec, self._trained_parts, model.compute_dtype, adapters=model.adapters)
        learning = {n: Facts(p.dtype, tuple(p.shape)) for n, p in whole.named_parameters() if p.requires_grad}
        restore(stored, learning, self.trained, self.optimizer, self.hardware.backend.rng)
        if self.loss_scale is not None:
            self.loss_scale = LossScale(**state["loss_scale"])

    def _accumulate(self, batches: Sequence[Batch], labelled: Labelled) -> Tensor:
        micro_batches = self._weighted(self.loss, batches, labelled)
        scale = 1.0 if self.loss_scale is None else self.loss_scale.scale
        if self.pipeline is not None:
            total = self.pipeline.backward(micro_batches, scale)
        else:
            total = self._backward(micro_batches, scale)
        if self.mesh is not None:
            self.mesh.sum_losses(total)
        return total

    def _weighted(self, mode: LossMode, batches: Sequence[Batch], labelled: Labelled) -> list[MicroBatch]:
        """The micro-batches with the weights of those labels that are this process's."""
        micro_batches = list(zip(batches, label_weights(mode, batches, labelled), strict=True))
        if self.mesh is not None and self.mesh.layout.context > 1:
            return [own_labels(*micro_batch, self.mesh.devices["cp"]) for micro_batch in micro_batches]
        return micro_batches

    def _forward(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """The sum of the losses."""
        total, device = torch.zeros((), device=self.hardware.device), self.hardware.device
        for batch, weights in micro_batches:
            total += self.model(batch.to(device), weights.to(device, non_blocking=True))
        return total

    def _backward(self, micro_batches: Sequence[MicroBatch], scale: float) -> Tensor:
        """Add up the gradients of the losses, times the scale; the sum of the losses."""
        total, device = torch.zeros((), device=self.hardware.device), self.hardware.device
        for number, (batch, weights) in enumerate(micro_batches, 1):
            sum_gradients_now(self.model, number == len(micro_batches))
            loss = self.model(batch.to(device), weights.to(device, non_blocking=True))
            (loss * scale).backward()
            total += loss.detach()
        return total

    def _clip(self) -> Tensor:
        parameters = list(self.trained.values())
        norm = global_norm(parameters, self.hardware.device, stages=self.mesh.layout.pipeline if self.mesh else 1)
        if self.clip_norm is not None:
            clip_gradients(parameters, norm, self.clip_norm)
        return norm

    def _describe_failure(self, result: StepResult, batches: Sequence[Batch]) -> str:
        where, ids = "Samples", [id for batch in batches for id in batch.ids]
        if self.pipeline is None:  # which samples a stage's neighbours fail on, it could not tell
            bad = self._of_all_processes(self._non_finite_samples(batches))
            where = (
                "Samples whose hidden states are not finite"
                if bad
                else "Each sample's hidden states are finite. Samples"
            )
            ids = bad or ids
        ids = self._of_all_processes(ids)
        return (
            f"loss {result.loss}, gradient norm {result.grad_norm}: the step was not applied, the weights are intact. "
            f"{where}: {', '.join(ids)}. Lower the learning rate, or look at these samples."
        )

    def _of_all_processes(self, ids: list[str]) -> list[str]:
        gathered = [ids] if self.mesh is None else self.mesh.processes.gather(ids)
        return list(dict.fromkeys(id for own in gathered for id in own))

    @torch.no_grad()
    def _non_finite_samples(self, batches: Sequence[Batch]) -> list[str]:
        """The ids of the step's samples that give NaN or infinity.

        Each attends to itself alone, so only bad ones do; where an attention kernel multiplies what is masked by zero,
        their neighbours in the micro-batch do, too.
        """
        found = []
        for batch in batches:
            hidden = self.model.hidden_states(batch.to(self.hardware.device), None)
            rows = hidden.isfinite().all(-1).cpu().split([b - a for a, b in pairwise(batch.cu_seqlens_host)])
            # Not strict: a filler, which every process must compute with the others, has a row and no id.
            found += [id for id, row in zip(batch.ids, rows, strict=False) if not row.all()]
        return found


@contextmanager
def evaluating(stages: Sequence[nn.Module]) -> Iterator[None]:
    """Within, forward passes are those of evaluation; after it the modules are as they were before."""
    modes = [(module, module.training) for stage in stages for module in stage.modules()]
    for stage in stages:
        stage.eval()
    try:
        # Not compiled: torch keeps a limited number of graphs, and those without gradients would take the training's.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, training in modes:
            module.training = training
        for stage in stages:
            free_gathered(stage)


def check_scale(loss_scale: LossScale) -> None:
    """Raises TrainingError for a scale at which nothing but a diverged run overflows."""
    if loss_scale.scale < MIN_LOSS_SCALE:
        raise TrainingError(
            f"fp16 gradients overflow even at a loss scale of {loss_scale.scale}; lower the learning rate, or train in "
            "bf16 or fp32 (train.precision)."
        )
