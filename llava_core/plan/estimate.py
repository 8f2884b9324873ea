"""What one process of a run would hold and send in a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava_core.config import RunConfig
from llava_core.engine.hardware import HOST, Hardware
from llava_core.engine.layout import Layout
from llava_core.engine.mesh import Mesh
from llava_core.engine.opset import Use
from llava_core.engine.parts import laid_out_like
from llava_core.engine.torch_engine import TorchEngine
from llava_core.model.freeze import part_of
from llava_core.model.llava import Llava
from llava_core.model.spec import ModelSpec
from llava_core.plan.collectives import Collective, CollectiveLog
from llava_core.plan.kernels import planned_ops
from llava_core.plan.memory import GRADIENTS, LOSS, OPTIMIZER, WEIGHTS, MemoryLedger
from llava_core.plan.simulation import Simulation, local
from llava_core.plan.step import PlannedStep, on_device, planned_batch
from llava_core.plan.subject import Subject
from llava_core.plan.world import pretended
from llava_core.train.flops import step_flops
from llava_core.train.prepare import build_engine
from llava_core.weights.load import outline
from llava_core.weights.rows import Sliceable
from llava_core.weights.source import ModelSource

ON_DISK = torch.float64
"""A dtype that no run has, so that every parameter gets memory of its own, as it does on a device."""


@dataclass(frozen=True)
class PlannedParameter:
    """A parameter, and what this process has of it.

    Attributes:
        shape: of the whole.
        local_shape: of this process's part.
    """

    name: str
    part: str
    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    dtype: str
    trained: bool

    @property
    def num_local(self) -> int:
        return prod(self.local_shape)


@dataclass(frozen=True)
class Estimate:
    """One process of a run.

    Attributes:
        parameters: those of this process.
        kernels: the kernel of each place that was simulated.
        step: what this process has of a step.
        memory_at_peak: bytes by kind when most is in use.
        largest: the most of each kind, whenever that is.
        peak: bytes of all kinds at that moment.
        flops: of all processes' work in a step.
        collectives: of this process in a step.
    """

    rank: int
    layout: Layout
    dtype: torch.dtype
    parameters: tuple[PlannedParameter, ...]
    kernels: dict[str, str]
    step: PlannedStep
    memory_at_peak: dict[str, int]
    largest: dict[str, int]
    peak: int
    flops: float
    collectives: tuple[Collective, ...]


def estimate(subject: Subject, layout: Layout, rank: int, step: PlannedStep) -> Estimate:
    """Go through a step of this rank. Raises LlavaError for what the run would refuse."""
    with pretended(rank, layout.world_size) as processes:
        mesh = Mesh.build(processes, layout, HOST) if processes.size > 1 else None
        ledger, log = MemoryLedger(), CollectiveLog(mesh)
        simulation = Simulation(ledger, log)
        batch = planned_batch(subject.spec, step)
        # Micro-batches are alike, save the last; in a pipeline the more there are, up to its depth, the more are kept.
        simulated = step.micro_batches if layout.pipeline > 1 else min(step.micro_batches, 2)
        with simulation.running():
            engine, kernels = weightless_engine(subject, mesh, simulation)
            give_optimizer_state(engine, ledger)
            run_step(engine, simulation, on_device(batch, subject.spec, simulation), simulated)
        config = subject.config
        sample = planned_batch(subject.spec, replace(step, micro_samples=1))
        flops = step_flops(subject.spec, config.train.trainable, [sample], subject.adapters) * config.batch.global_size
        named = (named for stage in engine.stages for named in stage.named_parameters())
        return Estimate(
            rank,
            layout,
            subject.dtype,
            tuple(planned_parameter(name, parameter) for name, parameter in named),
            kernels,
            step,
            dict(ledger.at_peak),
            dict(ledger.largest),
            ledger.peak,
            flops,
            tuple(log.of_step(step.micro_batches - simulated)),
        )


def weightless_engine(
    subject: Subject, mesh: Mesh | None, simulation: Simulation
) -> tuple[TorchEngine, dict[str, str]]:
    """The run's engine with parameters that have no memory, and the kernel of each place."""
    config, spec, dtype = subject.config, subject.spec, subject.dtype
    trainable = frozenset(config.train.trainable)
    layout = mesh.layout if mesh is not None else Layout()
    use = Use(dtype, trainable, config.data.max_length, config.train.deterministic, layout.tensor, layout.context)
    ops, kernels = planned_ops(spec, subject.backend, use, config.backend.kernels, is_here=bool(subject.devices))
    engine = build_engine(
        uncompiled(config),
        replace(weightless_source(spec, simulation), adapters=subject.adapters),
        ops,
        dtype,
        Hardware(subject.backend, torch.device(HOST)),
        mesh,
        part_of=partial(weightless_part, simulation),
    )
    for stage in engine.stages:
        count_loss(stage, simulation.ledger)
        for parameter in stage.parameters():
            simulation.ledger.relabel(local(parameter), WEIGHTS)
    return engine, kernels


def weightless_source(spec: ModelSpec, simulation: Simulation) -> ModelSource:
    """Weights of the right names and shapes."""
    tensors: dict[str, Callable[[], Sliceable]] = {
        name: partial(simulation.tensor, parameter.shape, ON_DISK)
        for name, parameter in outline(spec).named_parameters()
    }
    return ModelSource(spec, tensors, Path(), None, ())


def weightless_part(
    simulation: Simulation, parameter: nn.Parameter, _: Sliceable
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """As `engine.shard.part_of`, from the shape alone."""
    return simulation.tensor(local(parameter).shape, ON_DISK), partial(laid_out_like, parameter)


def uncompiled(config: RunConfig) -> RunConfig:
    """The config with what compiling would do left out: what it saves depends on a compiler that is not run."""
    return config.model_copy(update={"train": config.train.model_copy(update={"compile": False})})


def count_loss(model: Llava, ledger: MemoryLedger) -> None:
    """Have what the loss makes counted as the loss's."""
    loss = model.ops.linear_cross_entropy

    def counted(*arguments: Any) -> Tensor:
        with ledger.counting(LOSS):
            return loss(*arguments)

    model.ops = replace(model.ops, linear_cross_entropy=counted)


@torch.no_grad()
def give_optimizer_state(engine: TorchEngine, ledger: MemoryLedger) -> None:
    """What the optimizer keeps from its first update on: the first step, which has not got it yet, needs less."""
    for parameter in engine.trained.values():
        parameter.grad = torch.empty_like(parameter)
        ledger.relabel(local(parameter.grad), GRADIENTS)
    with ledger.counting(OPTIMIZER):
        engine.optimizer.step()
    engine.optimizer.zero_grad()


def run_step(engine: TorchEngine, simulation: Simulation, batch: Any, num_micro_batches: int) -> None:
    """A step of equal micro-batches, measured."""
    log = simulation.log

    def count(*_: Any) -> None:
        log.micro_batch += 1

    handle = engine.model.register_forward_pre_hook(count, prepend=True)
    simulation.ledger.start_peak()
    log.start()
    simulation.expect_gradients(engine.trained.values())
    engine.step([batch] * num_micro_batches, 1.0)
    handle.remove()


def planned_parameter(name: str, parameter: nn.Parameter) -> PlannedParameter:
    """From the model's own."""
    return PlannedParameter(
        name,
        part_of(name),
        tuple(parameter.shape),
        tuple(local(parameter).shape),
        str(parameter.dtype).removeprefix("torch."),
        parameter.requires_grad,
    )
