"""What the parity tests share: the cases, transformers' answers, and this library's model of the same weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from llava_core.backend import OpSet
from llava_core.data.batch import Batch, Example
from llava_core.data.packing import build_batch
from llava_core.data.tiles import Anyres
from llava_core.engine.opset import Use
from llava_core.engine.opset import build_ops as backend_ops
from llava_core.model.freeze import PARTS
from llava_core.model.llava import Llava
from llava_core.model.spec import ModelSpec
from llava_core.model.stage import Stage
from llava_core.testing.models import (
    IMAGE_TOKEN_ID,
    TINY_IMAGE_SIZES,
    TINY_PINPOINTS,
    classic_name,
    random_example,
    tiny_llava_config,
    tiny_llava_next_config,
    tiny_model,
    tiny_text_config,
    tiny_vision_config,
    unit_scale_,
)
from llava_core.weights.hf_config import model_spec
from llava_core.weights.load import load_model
from llava_core.weights.names import NEWLINE, NEWLINE_ON_DISK
from llava_core.weights.source import ModelSource
from tests.hardware import hardware

# One seed on a device: other weights take no other way through it.
SEEDS = (pytest.param(0, marks=pytest.mark.device), 1, 2)
EVERYTHING = frozenset(PARTS)
OP_SETS = ("reference", "backend")

LLAMA3_ROPE = {
    # head_dim 16 and 32 original positions: of the eight frequencies some are kept, some blended and some divided
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}


def _llava_with_text(family: str = "llama", **text: Any) -> PretrainedConfig:
    tied = text.get("tie_word_embeddings", False)
    return tiny_llava_config(tiny_text_config(family, **text), tie_word_embeddings=tied)


CASES: dict[str, Callable[[], PretrainedConfig]] = {
    "clip": tiny_llava_config,
    "clip_full": lambda: tiny_llava_config(
        vision=tiny_vision_config(hidden_act="gelu"), vision_feature_select_strategy="full"
    ),
    "layer_last": lambda: tiny_llava_config(vision_feature_layer=-1),
    "layer_third_last": lambda: tiny_llava_config(vision_feature_layer=-3),
    "layer_one": lambda: tiny_llava_config(vision_feature_layer=1),
    "siglip": lambda: tiny_llava_config(vision=tiny_vision_config("siglip"), vision_feature_select_strategy="full"),
    "siglip_last": lambda: tiny_llava_config(
        vision=tiny_vision_config("siglip"), vision_feature_select_strategy="full", vision_feature_layer=-1
    ),
    "anyres": tiny_llava_next_config,
    "anyres_siglip": lambda: tiny_llava_next_config(
        vision=tiny_vision_config("siglip"), vision_feature_select_strategy="full"
    ),
    "linear_projector": tiny_llava_config,
    "llama3_rope": lambda: _llava_with_text(rope_parameters=LLAMA3_ROPE, num_key_value_heads=2),
    "linear_rope": lambda: _llava_with_text(rope_parameters=LINEAR_ROPE),
    "grouped_queries": lambda: _llava_with_text(num_key_value_heads=2),
    "one_kv_head": lambda: _llava_with_text(num_key_value_heads=1),
    "wide_heads": lambda: _llava_with_text(head_dim=24, num_key_value_heads=2),
    "tied": lambda: _llava_with_text(tie_word_embeddings=True),
    "mistral_window": lambda: _llava_with_text("mistral", num_key_value_heads=2, sliding_window=5),
    "text_llama": lambda: tiny_text_config(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
    "text_llama_tied": lambda: tiny_text_config(tie_word_embeddings=True, num_key_value_heads=2),
    "text_mistral": lambda: tiny_text_config("mistral", num_key_value_heads=2, sliding_window=None),
    "text_mistral_window": lambda: tiny_text_config("mistral", sliding_window=6, head_dim=24),
}

# Pieces of text with an image between each two: one image, two, none, an image first; the lengths all differ.
IMAGE_SAMPLES = ((4, 9), (3, 2, 6), (12,), (0, 5))
TEXT_SAMPLES = ((17,), (5,), (23,))


class LinearProjector(nn.Module):
    """The `linear` projector in Hugging Face's terms: its first layer alone."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_1(features)


@dataclass(frozen=True)
class Reference:
    """A random Hugging Face model, samples, and what the model says of each of them alone.

    Attributes:
        logits: for each sample.
        loss: mean over the supervised tokens of all samples.
        gradients: of that loss, by this library's names; None where the loss does not depend on the parameter.
    """

    model: PreTrainedModel
    spec: ModelSpec
    examples: list[Example]
    logits: list[Tensor]
    loss: Tensor
    gradients: dict[str, Tensor | None]


def build_hf(case: str, seed: int) -> tuple[PreTrainedModel, ModelSpec]:
    """The random model of a case and its spec."""
    config = CASES[case]()
    model, spec = tiny_model(config, seed), model_spec(config, Path(case))
    if case == "linear_projector":
        model.model.multi_modal_projector = LinearProjector(config)
        unit_scale_(model, seed)
        spec = replace(spec, projector="linear")
    return model, spec


def build_examples(spec: ModelSpec, seed: int) -> list[Example]:
    """Mixed samples that the model can take."""
    pieces = IMAGE_SAMPLES if spec.vision else TEXT_SAMPLES
    return [random_example(spec, lengths, seed=100 * seed + i) for i, lengths in enumerate(pieces)]


@cache
def reference(case: str, seed: int) -> Reference:
    """The case's answers, in fp32."""
    model, spec = build_hf(case, seed)
    examples = build_examples(spec, seed)
    logits, loss, gradients = run_hf(model, examples)
    return Reference(model, spec, examples, logits, loss, gradients)


def run_hf(
    model: PreTrainedModel, examples: Sequence[Example]
) -> tuple[list[Tensor], Tensor, dict[str, Tensor | None]]:
    """Each sample alone through transformers: logits, the mean loss over all labels, and its gradients."""
    model.zero_grad(set_to_none=True)
    num_labels = sum(example.num_labels for example in examples)
    logits, total = [], torch.zeros(())
    for example in examples:
        out = model(**hf_inputs(model, example))
        # transformers divides by the sample's own labels.
        loss = out.loss.float() * example.num_labels / num_labels
        loss.backward()
        logits.append(out.logits[0].detach())
        total += loss.detach()
    gradients = {ours_name(model, name): p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return logits, total, gradients


def hf_inputs(model: PreTrainedModel, example: Example) -> dict[str, Tensor]:
    """One sample as transformers takes it: an image token at each visual position, labels −100 elsewhere."""
    tokens = example.tokens.clone()
    for start, length in zip(example.image_starts, example.visual_tokens, strict=True):
        tokens[start : start + length] = IMAGE_TOKEN_ID
    labels = torch.where(example.supervised, tokens, -100)
    inputs = {"input_ids": tokens[None], "labels": labels[None]}
    if example.pixels is not None:
        inputs["pixel_values"] = example.pixels.to(model.dtype)
        if example.merge is not None:
            inputs["image_sizes"] = torch.tensor([_anyres_size(length) for length in example.visual_tokens])
    return inputs


def _anyres_size(visual_tokens: int) -> tuple[int, int]:
    """The size of a `random_example`'s image: no two become equally many tokens."""
    tiling = Anyres(TINY_PINPOINTS)
    (size,) = (size for size in TINY_IMAGE_SIZES if tiling.visual_tokens(size, 24, 9) == visual_tokens)
    return size


def ours_name(model: PreTrainedModel, name: str) -> str:
    """This library's name, which is the hub's, under `language_model.` for a language model alone."""
    name = classic_name(model, name)
    if name == NEWLINE_ON_DISK:
        return NEWLINE
    return name if model.config.model_type.startswith("llava") else "language_model." + name


def build_ours(
    model: PreTrainedModel,
    spec: ModelSpec,
    *,
    ops: str = "reference",
    trainable: Collection[str] = EVERYTHING,
    compute_dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    stage: Stage | None = None,
) -> Llava:
    """This library's model with the weights of `model`; on the device under test, where no other is given."""
    parameters = {ours_name(model, name): p.detach() for name, p in model.named_parameters()}
    # SigLIP's pooling head comes after the features; LLaVA has no part like it.
    tensors = {n: (lambda tensor=p: tensor) for n, p in parameters.items() if ".vision_model.head." not in n}
    source = ModelSource(spec, tensors, Path(), None, ())
    op_set = build_ops(ops, spec, compute_dtype)
    return load_model(
        source,
        op_set,
        compute_dtype=compute_dtype,
        device=device or hardware().device,
        trainable=frozenset(trainable),
        stage=stage,
    )


def build_ops(name: str, spec: ModelSpec, dtype: torch.dtype) -> OpSet:
    """`reference`, or `backend`: the kernels that the backend under test chooses for training this model."""
    if name == "reference":
        return OpSet.of({})
    return backend_ops(spec, hardware().backend, Use(dtype, EVERYTHING, spec.text.max_positions, deterministic=False))[
        0
    ]


def build_examples_batch(spec: ModelSpec, examples: Sequence[Example], *, padded: bool = False) -> Batch:
    """The samples as one micro-batch, on the device under test."""
    image_size = spec.vision.image_size if spec.vision else 1
    return build_batch(examples, pad_id=0, image_size=image_size, padded=padded).to(hardware().device)


def mean_loss(model: Llava, batch: Batch) -> Tensor:
    """The mean over the batch's labels."""
    num_labels = batch.counts.label_tokens
    return model(batch, torch.full((num_labels,), 1 / max(num_labels, 1), device=batch.tokens.device))


def gradient_errors(model: Llava, expected: dict[str, Tensor | None]) -> dict[str, float]:
    """Each trained parameter's largest gradient error, as a fraction of its largest gradient in the reference."""
    errors: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        want = expected[name]
        if want is None or parameter.grad is None:
            assert want is None, f"{name} got no gradient"
            assert parameter.grad is None, f"{name} got a gradient where the reference has none"
            continue
        # Softmax does not see a shift of all keys: a key bias's exact gradient is zero, and what both have is the
        # rounding of the same sums as in the key weight's gradient.
        scale_of = name.replace("k_proj.bias", "k_proj.weight")
        scale = expected[scale_of]
        assert scale is not None
        errors[name] = float((parameter.grad.cpu().float() - want.float()).abs().max() / scale.float().abs().max())
    return errors
