"""The FLOPs of a step, against PyTorch's own counter on a real forward and backward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llava_core.data.batch import Labelled
from llava_core.model.adapters import Adapters, LowRank
from llava_core.model.spec import ModelSpec
from llava_core.testing.models import (
    random_example,
    tiny_llava_next_config,
    tiny_model,
    tiny_text_config,
    tiny_vision_config,
)
from llava_core.train.flops import step_flops
from llava_core.weights.hf_config import model_spec
from tests.unit.engine.support import batches, engine, hf_model

PARTS = ("vision", "projector", "language")
CHOICES = [("projector",), ("projector", "language"), PARTS, ("language",), ("vision",)]
LANGUAGE = "Llava.language_model"
LANGUAGE_ADAPTERS = LowRank(4, 4, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
VISION_ADAPTERS = LowRank(2, 2, ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"))


def counted(
    spec: ModelSpec,
    model: torch.nn.Module,
    trainable: tuple[str, ...],
    pieces: tuple[int, ...],
    adapters: Adapters | None = None,
) -> float:
    """What the counter sees of two micro-batches, less the half of causal attention that is never needed.

    One sample a micro-batch, so that attention's matmuls are of that sample's square and of nothing masked.
    """
    step = batches([random_example(spec, pieces, seed=i) for i in range(2)], [1, 1])
    # The reference's matmuls are those that the counter knows.
    trained = engine(model, spec, trainable=trainable, reference_ops=True, adapters=adapters)
    with FlopCounterMode(display=False) as counter:
        trained._accumulate(step, Labelled.of(step))
    counts = counter.get_flop_counts()
    causal = sum(counts[f"{LANGUAGE}.model.layers.{i}.self_attn"][torch.ops.aten.bmm] for i in range(2))
    assert causal > 0
    return counter.get_total_flops() - causal / 2


@pytest.mark.parametrize("trainable", CHOICES, ids="+".join)
def test_a_step_on_images_has_the_counters_flops(trainable: tuple[str, ...]) -> None:
    model, spec = hf_model(text=tiny_text_config(num_key_value_heads=2))
    step = batches([random_example(spec, (4, 9), seed=i) for i in range(2)], [1, 1])
    # Exactly: every matmul and convolution is counted from its shape on both sides.
    assert step_flops(spec, trainable, step) == counted(spec, model, trainable, (4, 9))


@pytest.mark.parametrize(
    ("trainable", "adapted"),
    [
        (("projector", "language"), {"language": LANGUAGE_ADAPTERS}),
        (("language",), {"language": LANGUAGE_ADAPTERS}),
        (PARTS, {"language": LowRank(3, 3, ("v_proj", "down_proj", "q_proj")), "vision": VISION_ADAPTERS}),
        (PARTS, {"vision": VISION_ADAPTERS}),
    ],
)
def test_a_step_with_adapters_has_the_counters_flops(trainable: tuple[str, ...], adapted: dict[str, LowRank]) -> None:
    model, spec = hf_model(text=tiny_text_config(num_key_value_heads=2))
    step = batches([random_example(spec, (4, 9), seed=i) for i in range(2)], [1, 1])
    adapters = Adapters(adapted)
    assert step_flops(spec, trainable, step, adapters) == counted(spec, model, trainable, (4, 9), adapters)


def test_two_images_and_the_class_token_are_counted() -> None:
    model, spec = hf_model(vision=tiny_vision_config(), vision_feature_select_strategy="full", vision_feature_layer=-1)
    step = batches([random_example(spec, (4, 2, 9), seed=i) for i in range(2)], [1, 1])
    assert step_flops(spec, PARTS, step) == counted(spec, model, PARTS, (4, 2, 9))


def test_tiles_are_counted_and_newlines_are_not_projected() -> None:
    config = tiny_llava_next_config()
    model, spec = tiny_model(config), model_spec(config, Path("tiny"))
    step = batches([random_example(spec, (4, 2, 9), seed=i) for i in range(2)], [1, 1])
    assert step_flops(spec, PARTS, step) == counted(spec, model, PARTS, (4, 2, 9))


def test_a_language_model_alone_has_the_counters_flops() -> None:
    model, spec = hf_model(text_only=True)
    step = batches([random_example(spec, (17,), seed=i) for i in range(2)], [1, 1])
    assert step_flops(spec, ("language",), step) == counted(spec, model, ("language",), (17,))


def test_padding_and_packing_are_not_work() -> None:
    _, spec = hf_model()
    samples = [random_example(spec, pieces, seed=i) for i, pieces in enumerate([(4, 9), (30,), (2, 3)])]
    apart = step_flops(spec, PARTS, batches(samples, [1, 1, 1]))
    assert step_flops(spec, PARTS, batches(samples, [3])) == apart


def test_a_window_bounds_the_attention() -> None:
    _, wide = hf_model(text=tiny_text_config("mistral", sliding_window=None))
    _, narrow = hf_model(text=tiny_text_config("mistral", sliding_window=4))
    step = batches([random_example(wide, (4, 21))], [1])
    length, window = 34, 4
    # Causal: half of the square. Within the window: half of its corner, then its whole width for every later token.
    saved = length**2 / 2 - (window**2 / 2 + (length - window) * window)
    difference = step_flops(wide, PARTS, step) - step_flops(narrow, PARTS, step)
    assert difference == pytest.approx(
        3 * 4 * saved * 64 * 2
    )  # forward and twice back, 4 FLOPs a pair and dim, 2 layers
