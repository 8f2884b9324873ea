"""Everything a run needs, built from its config in the order in which mistakes are cheapest to find."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from llava_core.backend import OpSet, Selection
from llava_core.config import RunConfig
from llava_core.data.images import ImageProcessor
from llava_core.data.loader import StepLoader
from llava_core.data.templates import Template
from llava_core.engine.context import share_sequences
from llava_core.engine.hardware import HOST, Hardware, compute_dtype, open_hardware
from llava_core.engine.layout import Layout
from llava_core.engine.mesh import Mesh
from llava_core.engine.offload import on_host
from llava_core.engine.opset import Use, build_ops
from llava_core.engine.pipeline import Pipeline
from llava_core.engine.processes import Processes
from llava_core.engine.recompute import Keeping, arrange_layers
from llava_core.engine.shard import Sharding, part_of, shard_data
from llava_core.engine.tensor import check_tensor, shard_tensors
from llava_core.engine.torch_engine import OptimizerSettings, TorchEngine
from llava_core.model.llava import Llava
from llava_core.plugins import Registry
from llava_core.train.checks import (
    check_backend,
    check_data_settings,
    check_offload,
    check_paths,
    check_recompute,
    check_shares,
    check_trackers,
    check_trainable,
)
from llava_core.train.chosen_model import open_model
from llava_core.train.data import data_share
from llava_core.train.lora import ADAPTER_FOLDER, adapters_of, check_lora
from llava_core.train.run_data import build_data
from llava_core.train.schedule import Schedule, build_schedule
from llava_core.train.stages import pipeline_stages
from llava_core.train.validation import Validation
from llava_core.weights.adapter_folder import put_adapters, refuse_other_than_adapter
from llava_core.weights.export import refuse_foreign
from llava_core.weights.load import PartOf, load_model
from llava_core.weights.source import ModelSource

EXPORT_FOLDER = "hf"
"""Where in the output folder the trained model is exported to."""


@dataclass(frozen=True)
class Run:
    """A run that is ready to start."""

    config: RunConfig
    processes: Processes
    hardware: Hardware
    source: ModelSource
    selections: Mapping[str, Selection]
    tokenizer: Any
    template: Template
    processor: ImageProcessor | None
    loader: StepLoader
    engine: TorchEngine
    schedule: Schedule
    validation: Validation | None = None

    def place(self, done: int) -> int:
        """How far the run is after `done` steps, in the schedule's unit."""
        return done if self.schedule.unit == "steps" else self.loader.tokens

    def is_over(self, done: int) -> bool:
        """Whether these were all of its steps."""
        return self.place(done) >= self.schedule.total

    def is_validation_due(self, done: int) -> bool:
        """Whether the model is to be validated after `done` steps, and was not yet."""
        return self.validation is not None and self.validation.is_due(done, at_end=self.is_over(done))


def open_run(config: RunConfig, registry: Registry, processes: Processes) -> Hardware:
    """Check what needs no device, then claim this process's.

    Raises:
        LlavaError: whatever cannot be honoured; nothing has been written.
    """
    check_paths(config)
    refuse_foreign(config.output / EXPORT_FOLDER)
    if config.lora is not None:
        refuse_other_than_adapter(config.output / ADAPTER_FOLDER)
    check_trackers(config, registry)
    check_lora(config)
    check_shares(config, Layout.of(config.parallel, processes.size))
    return open_hardware(
        config.backend.name,
        registry,
        threads=config.backend.threads,
        deterministic=config.train.deterministic,
        local_rank=processes.local_rank,
    )


def prepare(config: RunConfig, registry: Registry, hardware: Hardware, processes: Processes) -> Run:
    """Check the config against the machine and the files, then load the model, or this process's part of it.

    Raises:
        LlavaError: whatever cannot be honoured; nothing has been written but indices of large data sets.
    """
    dtype = compute_dtype(config.train.precision, hardware.backend)
    check_backend(config, hardware)
    check_offload(config, hardware)
    mesh = build_mesh(config, processes, hardware)
    seed_everything(config.train.seed, hardware)
    source = open_model(config.model)
    trainable = check_trainable(config, source.spec)
    if config.lora is not None:
        source = put_adapters(source, adapters_of(config.lora), config.lora.path, config.train.trainable)
    check_tensor(source.spec, config.parallel.tensor)
    check_recompute(config, source.spec)
    pipeline_stages(config, source.spec)
    check_data_settings(config, source.spec)
    use = Use(
        dtype,
        trainable,
        config.data.max_length,
        config.train.deterministic,
        config.parallel.tensor,
        config.parallel.context,
    )
    ops, selections = build_ops(source.spec, hardware.backend, use, config.backend.kernels)
    if config.train.compile:
        ops = outside_compiled_graphs(ops)
    data = build_data(config, registry, processes, source.folders, data_share(mesh))
    engine = build_engine(config, source, ops, dtype, hardware, mesh)
    schedule = build_schedule(config, data.loader.steps_per_epoch)
    return Run(
        config,
        processes,
        hardware,
        source,
        selections,
        data.tokenizer,
        data.templates.export,
        data.processor,
        data.loader,
        engine,
        schedule,
        data.validation,
    )


def build_engine(
    config: RunConfig,
    source: ModelSource,
    ops: OpSet,
    dtype: torch.dtype,
    hardware: Hardware,
    mesh: Mesh | None,
    part_of: PartOf = part_of,
) -> TorchEngine:
    """The model's weights, or this process's part of them, and their optimizer.

    Args:
        part_of: as `load_model` takes it.
    """
    trainable = frozenset(config.train.trainable)
    load = partial(
        load_model,
        source,
        ops,
        compute_dtype=dtype,
        device=torch.device(HOST) if config.parallel.offload else hardware.device,
        trainable=trainable,
        seed=config.train.seed,
        arrange=partial(arrange, config=config, mesh=mesh, hardware=hardware),
        part_of=part_of,
    )
    stages = pipeline_stages(config, source.spec)
    models = [load(stage=stage) for stage in (stages if mesh is None else mesh.own_stages(stages))]
    pipeline = None
    if mesh is not None and mesh.layout.pipeline > 1:
        pipeline = Pipeline(models, mesh, hardware.device)
    return TorchEngine(models[0], hardware, optimizer_settings(config, trainable), config.train.loss, mesh, pipeline)


def build_mesh(config: RunConfig, processes: Processes, hardware: Hardware) -> Mesh | None:
    """The run's processes on their layout; None for one process, unless its weights are kept on the host."""
    if processes.size == 1 and not config.parallel.offload:
        return None
    return Mesh.build(processes, Layout.of(config.parallel, processes.size), hardware.device.type)


def arrange(model: Llava, *, config: RunConfig, mesh: Mesh | None, hardware: Hardware) -> None:
    """What a model is made into while it has no memory: spread over processes, compiled, told what to keep."""
    if mesh is not None:
        if mesh.layout.context > 1:
            share_sequences(model, mesh.devices["cp"])
        if mesh.layout.tensor > 1:
            shard_tensors(model, mesh.devices["tp"], sequence=config.parallel.sequence)
    train = config.train
    store = on_host(hardware) if train.offload_activations else None
    arrange_layers(model, Keeping(train.recompute, train.recompute_layers, store, train.compile))
    if mesh is not None:
        shard_data(model, mesh, Sharding.of(config.parallel, hardware.backend))


def optimizer_settings(config: RunConfig, trainable: frozenset[str]) -> OptimizerSettings:
    """The optimizer's part of the config."""
    settings = config.optimizer
    rates = settings.part_learning_rates
    return OptimizerSettings(
        learning_rates={part: getattr(rates, part) or settings.learning_rate for part in trainable},
        weight_decay=settings.weight_decay,
        betas=settings.betas,
        eps=settings.eps,
        clip_norm=settings.clip_norm,
        on_host=config.parallel.offload,
    )


def seed_everything(seed: int, hardware: Hardware) -> None:
    """Seed Python, the host's torch and the device."""
    random.seed(seed)
    torch.manual_seed(seed)
    hardware.backend.rng.seed(seed)


def outside_compiled_graphs(ops: OpSet) -> OpSet:
    """The same functions with a graph break at attention.

    It reads the samples' lengths on the host; compiled in, each batch's lengths would be another graph.
    """
    return replace(ops, attention=torch.compiler.disable(ops.attention))
