"""What the engine's tests share: an engine over a tiny random model, and the same model in transformers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llava_core.backend import OpSet
from llava_core.data.batch import Batch, Example, Labelled
from llava_core.data.packing import build_batch
from llava_core.engine.loss import LossMode
from llava_core.engine.mesh import Mesh
from llava_core.engine.opset import Use, build_ops
from llava_core.engine.pipeline import Pipeline
from llava_core.engine.shard import Sharding, part_of, shard_data
from llava_core.engine.torch_engine import OptimizerSettings, TorchEngine
from llava_core.model.adapters import Adapters
from llava_core.model.llava import Llava
from llava_core.model.spec import ModelSpec
from llava_core.model.stage import Stage
from llava_core.testing.models import (
    IMAGE_TOKEN_ID,
    classic_name,
    random_example,
    tiny_llava_config,
    tiny_model,
    tiny_text_config,
)
from llava_core.weights.hf_config import model_spec
from llava_core.weights.load import leave_whole, load_model
from llava_core.weights.names import NEWLINE, NEWLINE_ON_DISK
from llava_core.weights.source import ModelSource
from tests.hardware import hardware

PIECES = ((4, 9), (3, 2, 6), (12,), (5, 5), (2, 20), (17,), (6, 3), (1, 8))
"""Lengths of the texts between images: one, two and no images, all lengths different."""

STAGE_2 = ("projector", "language")
FULL = Sharding(keep_weights=False, reduce_dtype=torch.float32)


def hf_model(seed: int = 0, *, text_only: bool = False, **changes: Any) -> tuple[PreTrainedModel, ModelSpec]:
    """A random LLaVA of transformers, or its language model alone, and the spec."""
    config = tiny_text_config(**changes) if text_only else tiny_llava_config(**changes)
    return tiny_model(config, seed), model_spec(config, Path("tiny"))


def examples(spec: ModelSpec, count: int = 8, seed: int = 0) -> list[Example]:
    return [random_example(spec, PIECES[i % len(PIECES)], seed=100 * seed + i) for i in range(count)]


def batches(samples: Sequence[Example], sizes: Sequence[int], *, padded: bool = False) -> list[Batch]:
    """The samples in micro-batches of these sizes."""
    assert sum(sizes) == len(samples)
    rest = list(samples)
    taken = [[rest.pop(0) for _ in range(size)] for size in sizes]
    return [build_batch(group, pad_id=0, image_size=24, padded=padded) for group in taken]


def engine(
    model: PreTrainedModel,
    spec: ModelSpec,
    *,
    trainable: Collection[str] = STAGE_2,
    dtype: torch.dtype = torch.float32,
    loss: LossMode = "token_mean",
    weight_decay: float = 0.0,
    clip_norm: float | None = 1.0,
    reference_ops: bool = False,
    mesh: Mesh | None = None,
    sharding: Sharding = FULL,
    stages: Sequence[Stage] = (),
    arrange: Callable[[Llava], None] = leave_whole,
    adapters: Adapters | None = None,
    **learning_rates: float,
) -> TorchEngine:
    """An engine over the weights of `model`, on the kernels of the backend under test; 1e-3 for every part without a
    rate of its own. With a mesh, this process's part of it; with stages of a pipeline, these. `arrange` comes
    before sharding."""
    prefix = "" if spec.vision else "language_model."
    named = {prefix + classic_name(model, name): p.detach() for name, p in model.named_parameters()}
    if NEWLINE_ON_DISK in named:
        named[NEWLINE] = named.pop(NEWLINE_ON_DISK)
    # SigLIP's pooling head comes after the features and is no part of a LLaVA.
    tensors = {n: (lambda tensor=p: tensor) for n, p in named.items() if ".vision_model.head." not in n}
    source = ModelSource(spec, tensors, Path(), None, (), adapters=adapters)
    parts = frozenset(trainable)
    ops, _ = build_ops(spec, hardware().backend, Use(dtype, parts, max_length=64, deterministic=True))
    ops = OpSet.of({}) if reference_ops else ops
    spread: dict[str, Any] = {}
    if mesh is not None:

        def lay_out(ours: Llava) -> None:
            arrange(ours)
            shard_data(ours, mesh, sharding)

        spread = {"arrange": lay_out, "part_of": part_of}
    load = partial(load_model, source, ops, compute_dtype=dtype, device=hardware().device, trainable=parts, **spread)
    rates = {part: learning_rates.get(part, 1e-3) for part in trainable}
    settings = OptimizerSettings(rates, weight_decay, (0.9, 0.999), 1e-8, clip_norm)
    models = [load(stage=stage) for stage in stages or (None,)]
    pipeline = Pipeline(models, mesh, hardware().device) if stages and mesh is not None else None
    return TorchEngine(models[0], hardware(), settings, loss, mesh, pipeline)


def hf_inputs(example: Example) -> dict[str, Tensor]:
    """A sample as transformers takes it: an image token at each visual position, -100 where nothing is supervised."""
    tokens = example.tokens.clone()
    for start, length in zip(example.image_starts, example.visual_tokens, strict=True):
        tokens[start : start + length] = IMAGE_TOKEN_ID
    inputs = {"input_ids": tokens[None], "labels": torch.where(example.supervised, tokens, -100)[None]}
    return inputs if example.pixels is None else inputs | {"pixel_values": example.pixels}


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """Copies on the host."""
    return {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters()}


def gradients(trained: TorchEngine, step: Sequence[Batch]) -> tuple[float, dict[str, Tensor]]:
    """The step's loss and what its backward pass leaves, before clipping and without an update; on the host."""
    loss = float(trained._accumulate(step, Labelled.of(step)))
    grads = {name: p.grad.to("cpu", copy=True) for name, p in trained.trained.items() if p.grad is not None}
    trained.optimizer.zero_grad()
    return loss, grads


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of any tensor as a fraction of its largest value."""
    assert found.keys() == expected.keys()
    return max(float((found[n] - e).abs().max() / e.abs().max().clamp(min=1e-12)) for n, e in expected.items())
