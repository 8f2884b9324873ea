"""Everything a run needs, built from its config in the order in which mistakes are cheapest to find."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from llava_core.backend import OpSet, Selection
from llava_core.config import RunConfig
from llava_core.config.schema import DataConfig, ModelConfig
from llava_core.data.examples import ExampleBuilder, ImageSide
from llava_core.data.image_store import ImageStore
from llava_core.data.images import ImageProcessor
from llava_core.data.loader import Batching, StepLoader
from llava_core.data.quarantine import Quarantine
from llava_core.data.readers import SUFFIX_READERS, Reader, open_reader
from llava_core.data.records import modality_length
from llava_core.data.sampler import Grouping, epoch_order
from llava_core.data.templates import Template
from llava_core.engine.hardware import Hardware, compute_dtype, open_hardware
from llava_core.engine.opset import Use, build_ops
from llava_core.engine.torch_engine import OptimizerSettings, TorchEngine
from llava_core.errors import BadRow, ConfigError
from llava_core.inference.chat_template import OWN_TEMPLATE, folder_template
from llava_core.model.llava import Llava
from llava_core.model.spec import ModelSpec
from llava_core.plugins import Registry
from llava_core.train.checks import (
    check_backend,
    check_data_settings,
    check_paths,
    check_trackers,
    check_trainable,
    check_vocabulary,
)
from llava_core.train.schedule import Schedule, warmup_steps
from llava_core.weights.export import exported_tokenizer, refuse_foreign
from llava_core.weights.load import load_model
from llava_core.weights.source import ModelSource, compose, from_folder
from llava_core.weights.tokenizer import load_tokenizer, pad_token_id

EXPORT_FOLDER = "hf"
"""Where in the output folder the trained model is exported to."""


@dataclass(frozen=True)
class Run:
    """A run that is ready to start."""

    config: RunConfig
    hardware: Hardware
    source: ModelSource
    selections: Mapping[str, Selection]
    tokenizer: Any
    template: Template
    processor: ImageProcessor | None
    loader: StepLoader
    engine: TorchEngine
    schedule: Schedule


def prepare(config: RunConfig, registry: Registry) -> Run:
    """Check the config against the machine and the files, then load the model.

    Raises:
        LlavaError: whatever cannot be honoured; nothing has been written.
    """
    check_paths(config)
    refuse_foreign(config.output / EXPORT_FOLDER)
    check_trackers(config, registry)
    hardware = open_hardware(
        config.backend.name,
        registry,
        threads=config.backend.threads,
        deterministic=config.train.deterministic,
    )
    dtype = compute_dtype(config.train.precision, hardware.backend)
    check_backend(config, hardware)
    seed_everything(config.train.seed, hardware)
    source = open_source(config.model)
    trainable = check_trainable(config, source.spec)
    check_data_settings(config, source.spec)
    use = Use(dtype, trainable, config.data.max_length, config.train.deterministic)
    ops, selections = build_ops(source.spec, hardware.backend, use, config.backend.kernels)
    if config.train.compile:
        ops = outside_compiled_graphs(ops)
    tokenizer = load_tokenizer(source.tokenizer_folder)
    check_vocabulary(tokenizer, source.spec)
    template = find_template(config.data.template, registry, tokenizer, source)
    processor = find_processor(config.data, source)
    loader = build_loader(config, registry, source.spec, tokenizer, template, processor)
    model = load_model(
        source,
        ops,
        compute_dtype=dtype,
        device=hardware.device,
        trainable=trainable,
        projector_seed=config.train.seed,
    )
    apply_memory_and_speed(model, recompute=config.train.recompute, compiled=config.train.compile)
    engine = TorchEngine(model, hardware, optimizer_settings(config, trainable), config.train.loss)
    schedule = build_schedule(config, loader.steps_per_epoch)
    return Run(config, hardware, source, selections, tokenizer, template, processor, loader, engine, schedule)


def open_source(config: ModelConfig) -> ModelSource:
    """The model that the config names. Raises WeightsError."""
    if config.path is not None:
        return from_folder(config.path)
    assert config.vision is not None
    assert config.language is not None
    return compose(
        config.vision,
        config.language,
        config.projector,
        projector_type=config.projector_type,
        feature_layer=config.vision_feature_layer,
        feature_select=config.vision_feature_select,
    )


def find_template(name: str, registry: Registry, tokenizer: Any, source: ModelSource) -> Template:
    """The conversation template of that name, or the tokenizer's own; one that an export can carry.

    Raises:
        ConfigError: no chat template says what this one does, so that an export would answer otherwise than it learnt.
    """
    multimodal = source.spec.vision is not None
    if name == OWN_TEMPLATE:
        template = folder_template(source.tokenizer_folder, tokenizer, multimodal=multimodal)
    else:
        template = registry.load("template", name)
    exported_tokenizer(tokenizer, template, multimodal=multimodal)
    return template


def find_processor(config: DataConfig, source: ModelSource) -> ImageProcessor | None:
    """The image processor of the model's folder, with the config's aspect; None for a language model.

    Raises:
        ConfigError: it does not give the image size that the tower takes.
    """
    if source.processor_folder is None or source.spec.vision is None:
        return None
    processor = ImageProcessor.from_folder(source.processor_folder, config.image_aspect)
    expected = source.spec.vision.image_size
    if processor.output_size != (expected, expected):
        raise ConfigError(
            f"{source.processor_folder}: its image processor gives {processor.output_size} pixels and the vision tower "
            f"takes {expected} x {expected}; mend preprocessor_config.json."
        )
    return processor


def build_loader(
    config: RunConfig,
    registry: Registry,
    spec: ModelSpec,
    tokenizer: Any,
    template: Template,
    processor: ImageProcessor | None,
) -> StepLoader:
    """The data of the run."""
    data = config.data
    reader = _open_reader(data, registry)
    images = None
    if processor is not None and spec.vision is not None and data.images is not None:
        store = ImageStore(data.images, data.max_image_pixels)
        images = ImageSide(store, processor, spec.vision.visual_tokens)
    pad_id = pad_token_id(tokenizer, spec.text.vocab_size)
    builder = ExampleBuilder(reader, template, tokenizer, images, pad_id, data.max_length)
    batching = Batching(
        global_size=config.batch.global_size,
        micro_tokens=config.batch.micro_tokens,
        micro_size=config.batch.micro_size,
        pad_id=pad_id,
        image_size=spec.vision.image_size if spec.vision else 1,
    )
    micro_size = config.batch.micro_size or 1  # packed micro-batches are formed later, so every row is its own chunk
    grouping = None
    if data.order == "modality_length":
        grouping = Grouping(_modality_lengths(reader), micro_size, config.batch.global_size // micro_size)
    quarantine = Quarantine(config.output / "quarantine.jsonl", data.max_bad_fraction)
    return StepLoader(
        builder,
        lambda epoch: epoch_order(data.order, len(reader), config.train.seed, epoch, grouping),
        batching,
        quarantine,
        data.num_workers,
    )


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
    )


def build_schedule(config: RunConfig, steps_per_epoch: int) -> Schedule:
    """The learning rate over the steps that the run will take."""
    limits = [config.train.max_steps, config.train.epochs and config.train.epochs * steps_per_epoch]
    total = min(limit for limit in limits if limit is not None)
    settings = config.optimizer
    warmup = warmup_steps(total, fraction=settings.warmup_fraction, steps=settings.warmup_steps)
    if warmup > total:
        raise ConfigError(f"optimizer.warmup_steps = {warmup}: the run has only {total} steps.")
    recorded = config.log.profile_steps
    if recorded is not None and recorded[1] > total:
        raise ConfigError(f"log.profile_steps = {list(recorded)}: the run has only {total} steps.")
    return Schedule(settings.schedule, total, warmup, settings.final_fraction)


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


def apply_memory_and_speed(model: Llava, *, recompute: bool, compiled: bool) -> None:
    """Recompute decoder layers in the backward pass; compile them."""
    decoder = model.language_model.model
    decoder.recompute = recompute
    if compiled:
        for layer in decoder.layers:
            layer.compile(dynamic=True)


def _open_reader(config: DataConfig, registry: Registry) -> Reader:
    name = config.reader or SUFFIX_READERS.get(config.path.suffix.lower())
    names = [name] if name is not None else registry.names("reader")  # without a name its message lists them
    return open_reader(config.path, name, {name: registry.load("reader", name) for name in names})


def _modality_lengths(reader: Reader) -> list[int]:
    """Every row's length for grouping; one without words or that cannot be read counts as a word of text."""
    lengths = []
    for index in range(len(reader)):
        try:
            lengths.append(modality_length(reader.read(index)) or -1)
        except BadRow:
            lengths.append(-1)
    return lengths
