"""How a pipeline divides a model: which layers each stage has."""

from __future__ import annotations

import inspect
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch.distributed.pipelining import Schedule1F1B

from llava_core.config import RunConfig
from llava_core.data.batch import Batch, Counts
from llava_core.data.tiles import Division
from llava_core.errors import ConfigError
from llava_core.model.spec import ModelSpec
from llava_core.model.stage import Stage
from llava_core.train.data import dynamic_tiles, largest_image
from llava_core.train.flops import projector_flops, step_flops, vision_flops
from llava_core.train.lora import adapters_of


def pipeline_stages(config: RunConfig, spec: ModelSpec) -> tuple[Stage, ...]:
    """All stages of a run's pipeline, first to last; one of everything where it has none.

    Raises:
        ConfigError: the model cannot be divided so.
    """
    parallel, num_layers = config.parallel, spec.text.num_layers
    if parallel.pipeline == 1:
        return (Stage.whole(spec.text),)
    if "return_outputs" not in inspect.signature(Schedule1F1B.step).parameters:
        raise ConfigError(
            f"parallel.pipeline = {parallel.pipeline}: the pipelines of PyTorch {torch.__version__} lack what is "
            "needed; install a newer one, such as 2.13, with which this was tested."
        )
    if spec.text.tied_embeddings:
        raise ConfigError(
            f"parallel.pipeline = {parallel.pipeline}: this model's head is its embedding, which the first stage has "
            "and the last would need; leave the pipeline out."
        )
    if parallel.num_stages > num_layers:
        raise ConfigError(f"{parallel.num_stages} stages: the language model has only {num_layers} layers to divide.")
    counts = parallel.stage_layers or balanced(num_layers, parallel.num_stages, *work_around_layers(config, spec))
    if sum(counts) != num_layers:
        raise ConfigError(
            f"parallel.stage_layers = {list(counts)}: {sum(counts)} layers, and the language model has {num_layers}."
        )
    return tuple(Stage(range(*bounds), num_layers) for bounds in pairwise((0, *accumulate(counts))))


def balanced(num_layers: int, num_stages: int, before: float, after: float) -> tuple[int, ...]:
    """Layers of each stage, so that the stage with most to do has as little as can be.

    Args:
        before, after: the first and the last stage's other work, in layers.
    """
    work = [1.0] * num_stages
    work[0] += before
    work[-1] += after
    counts = [1] * num_stages
    for _ in range(num_layers - num_stages):
        least = work.index(min(work))
        counts[least] += 1
        work[least] += 1
    return tuple(counts)


def work_around_layers(config: RunConfig, spec: ModelSpec) -> tuple[float, float]:
    """The work before the first layer and after the last, in layers, in a full micro-batch of the longest samples, each
    with an image, all text supervised."""
    trainable, batch = config.train.trainable, full_batch(config, spec)
    adapters = None if config.lora is None else adapters_of(config.lora)

    def flops(num_layers: int) -> float:
        return step_flops(replace(spec, text=replace(spec.text, num_layers=num_layers)), trainable, [batch], adapters)

    layer = flops(3) - flops(2)
    before = 0.0
    if spec.vision is not None:
        adapted = None if adapters is None else adapters.parts.get("vision")
        tower = vision_flops(spec.vision, trained="vision" in trainable, adapted=adapted)
        before = batch.counts.tiles * tower + batch.counts.image_tokens * projector_flops(spec, trainable)
    return before / layer, (flops(1) - before) / layer - 1


def full_batch(config: RunConfig, spec: ModelSpec) -> Batch:
    """The sizes of such a micro-batch; it holds nothing."""
    length, nothing = config.data.max_length, torch.zeros(0)
    samples = config.batch.micro_size or (config.batch.micro_tokens or length) // length
    image = largest_image(spec, dynamic_tiles(config.data), length) or Division(0, 0, 0)
    image_tokens = samples * image.visual_tokens
    text = samples * length - image_tokens
    return Batch(
        tokens=nothing,
        positions=nothing,
        cu_seqlens=nothing,
        cu_seqlens_host=tuple(range(0, samples * length + 1, length)),
        pixels=nothing,
        image_index=nothing,
        visual_tokens=(),
        label_index=nothing,
        targets=nothing,
        labels_per_sample=(text // samples,) * samples,
        counts=Counts(text, image_tokens, text, 0, samples, samples if image.tiles else 0, samples * image.tiles),
        ids=(),
    )
