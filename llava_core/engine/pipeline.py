"""Pipeline parallelism: stages of the model in different processes, micro-batches on their way through them.

PyTorch's schedules decide who computes what when: 1F1B (arXiv:2104.04473), where each process has one stage, and its
interleaved kind, where each has several. Between stages goes the stream between two layers, in micro-batches of one
size, so that no process need be told what it will receive. Labels and lengths do not travel: every process of a
pipeline reads the same samples, and so knows each step's size. The head's loss is the last stage's output.

Within a step PyTorch keeps a stage's weights gathered from its first backward pass on, and sums gradients over
data-parallel processes once, after its last; interleaved stages are gathered whole.

Shapes: T tokens of a micro-batch, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, distributed, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from llava_core.data.batch import Batch
from llava_core.engine.context import Chunks
from llava_core.engine.mesh import Mesh
from llava_core.engine.parts import Facts
from llava_core.model.llava import Llava
from llava_core.weights.load import outline
from llava_core.weights.shards import whole_tensor

MicroBatch: TypeAlias = tuple[Batch, Tensor]
"""What a stage takes beside the stream: a batch on the host, and the weights of its labels."""


def num_micro_batches(least: int, num_processes: int, *, interleaved: bool) -> int:
    """How many micro-batches a step must have, of which `least` have samples, for the schedule to be defined."""
    number = max(least, num_processes)
    while interleaved and number % (number // num_processes):
        number += 1
    return number


class Pipeline:
    """This process's stages of a model, and the way of micro-batches through them."""

    def __init__(self, stages: Sequence[Llava], mesh: Mesh, device: torch.device) -> None:
        """
        Args:
            stages: in their order; the processes of a pipeline take turns.
        """
        self.stages = stages
        self._mesh = mesh
        self._device = device
        self._loss_scale = 1.0
        self._coming: dict[Llava, Iterator[MicroBatch]] = {}
        for stage in stages:
            stage.register_forward_pre_hook(self._take)

    def backward(self, micro_batches: Sequence[MicroBatch], loss_scale: float) -> Tensor:
        """The gradients of all micro-batches' losses, times the scale, take the place of this process's parameters'.

        Args:
            micro_batches: equally long.

        Returns:
            The sum of the losses, on the process with the last stage; 0 on the others.
        """
        return self._run(self._build_schedule(micro_batches).step, micro_batches, loss_scale)

    def forward(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """The sum of the losses as `backward` gives it, without gradients."""
        return self._run(self._build_schedule(micro_batches).eval, micro_batches, 1.0)

    def _run(self, take: Callable[..., Any], micro_batches: Sequence[MicroBatch], loss_scale: float) -> Tensor:
        self._loss_scale = loss_scale
        # Every schedule takes a stage's micro-batches in their order.
        self._coming = {stage: iter(micro_batches) for stage in self.stages}
        losses: list[Tensor] = []
        try:
            take(target=torch.arange(len(micro_batches)), losses=losses, return_outputs=False)
        except RuntimeError as error:
            # torch puts its own error around what a stage raised, and hides with it whether other processes are lost.
            raise error.__cause__ or error from None
        total = torch.zeros((), device=self._device)
        for loss in losses:
            total += loss.detach() / loss_scale
        return total

    def whole_weights(self, names: Container[str] | None = None) -> Iterator[Tensor]:
        """Each weight of the whole model, or each of `names`, in the order of its outline, in every process; a step of
        one is a step of all."""
        place = self._mesh.devices.get_local_rank("pp")
        own = {name: parameter.detach() for stage in self.stages for name, parameter in stage.named_parameters()}
        facts = {name: Facts(weight.dtype, tuple(weight.shape)) for name, weight in own.items()}
        found = self._mesh.processes.gather((place, facts))
        holders = {name: (holder, facts) for holder, held in found for name, facts in held.items()}
        first = self.stages[0]
        for name, _ in outline(first.spec, adapters=first.adapters).named_parameters():
            if names is not None and name not in names:
                continue
            holder, known = holders[name]
            weight = torch.empty(known.shape, dtype=known.dtype, device=self._device)
            if holder == place:
                weight = whole_tensor(own[name]).to(self._device).contiguous()  # it may be kept on the host
            distributed.broadcast(weight, group=self._mesh.devices.get_group("pp"), group_src=holder)
            yield weight

    def _take(self, stage: nn.Module, stream: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """Before a stage's forward pass: the micro-batch whose turn it is, beside the stream."""
        assert isinstance(stage, Llava)
        batch, weights = next(self._coming[stage])
        if not stage.stage.is_first:
            batch = replace(batch, pixels=batch.pixels[:0])  # not worth a copy to the device
        return batch.to(self._device), weights.to(self._device, non_blocking=True), *stream

    def _build_schedule(self, micro_batches: Sequence[MicroBatch]) -> Schedule1F1B | ScheduleInterleaved1F1B:
        """One for this step alone: torch's knows number and size, and keeps each micro-batch's stream to the next.

        In its first use neighbours tell each other a number, and the host waits for it: little beside a step.
        """
        num_batches, length = len(micro_batches), self._stream_length(micro_batches)
        devices, size = self._mesh.devices, self._mesh.layout.pipeline
        first, count = devices.get_local_rank("pp"), len(self.stages)
        stages = [
            PipelineStage(
                model,
                first + place * size,
                count * size,
                self._device,
                input_args=() if model.stage.is_first else _stream(model, length),
                output_args=torch.empty((), device="meta") if model.stage.is_last else _stream(model, length),
                group=devices.get_group("pp"),
            )
            for place, model in enumerate(self.stages)
        ]
        if count > 1:
            return ScheduleInterleaved1F1B(stages, num_batches, self._scaled, scale_grads=False)  # type: ignore[arg-type]
        return Schedule1F1B(stages[0], num_batches, self._scaled, scale_grads=False)

    def _stream_length(self, micro_batches: Sequence[MicroBatch]) -> int:
        """Tokens of a micro-batch that pass between stages."""
        lengths = {batch.num_tokens for batch, _ in micro_batches}
        assert len(lengths) == 1, f"micro-batches of {sorted(lengths)} tokens in one step of a pipeline"
        (length,) = lengths
        return 2 * Chunks.of(length, self._mesh.devices["cp"]).length if self._mesh.layout.context > 1 else length

    def _scaled(self, loss: Tensor, _: Tensor) -> Tensor:
        return loss * self._loss_scale


def _stream(model: Llava, length: int) -> Tensor:
    """What passes between stages, without memory: its shape and dtype."""
    width = model.spec.text.hidden_size
    return torch.empty(length, width, dtype=model.compute_dtype, device="meta", requires_grad=True)
