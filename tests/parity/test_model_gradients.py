"""Gradients of every trained parameter against transformers' on the host."""

from __future__ import annotations

import pytest
import torch

from llava_core.model.freeze import part_of
from llava_core.model.llava import Llava
from llava_core.testing.models import random_example
from tests.parity.support import (
    CASES,
    EVERYTHING,
    OP_SETS,
    SEEDS,
    build_examples_batch,
    build_ours,
    gradient_errors,
    mean_loss,
    reference,
)

# Of a gradient's largest entry. Both sides sum the same fp32 products in another order, and a gradient is such a sum
# over some 80 tokens through the whole model; measured at most 3e-6. A missing term is of order 1.
GRADIENT_TOLERANCE = 2e-5

VISION_CASES = [case for case in CASES if not case.startswith("text_")]
every_seed = pytest.mark.parametrize("seed", SEEDS)
every_op_set = pytest.mark.parametrize("ops", OP_SETS)


def trained(case, seed, ops, trainable, **options) -> tuple[Llava, dict[str, float]]:
    """The model after one backward pass, and each parameter's gradient error."""
    known = reference(case, seed)
    model = build_ours(known.model, known.spec, ops=ops, trainable=trainable)
    mean_loss(model, build_examples_batch(known.spec, known.examples, **options)).backward()
    return model, gradient_errors(model, known.gradients)


def assert_small(errors: dict[str, float]) -> None:
    wrong = {name: error for name, error in errors.items() if error > GRADIENT_TOLERANCE}
    assert not wrong


@pytest.mark.parametrize("case", CASES)
@every_seed
@every_op_set
def test_all_trained(case, seed, ops):
    _, errors = trained(case, seed, ops, EVERYTHING)
    assert_small(errors)


@pytest.mark.parametrize("case", VISION_CASES)
@every_seed
@every_op_set
def test_only_the_projector_trained(case, seed, ops):
    model, errors = trained(case, seed, ops, {"projector"})
    assert_small(errors)
    assert {part_of(name) for name in errors} == {"projector"}
    assert {part_of(name) for name, p in model.named_parameters() if p.grad is not None} == {"projector"}


@pytest.mark.device
@pytest.mark.parametrize("case", ["clip", "siglip", "mistral_window", "tied"])
@every_op_set
def test_projector_and_language_trained(case, ops):
    """Stage 2: the tower stays frozen."""
    model, errors = trained(case, 0, ops, {"projector", "language"})
    assert_small(errors)
    assert all(p.grad is None for p in model.vision_tower.parameters())


@pytest.mark.device
@pytest.mark.parametrize("case", ["clip", "mistral_window", "text_llama_tied"])
@every_op_set
def test_padded(case, ops):
    _, errors = trained(case, 0, ops, EVERYTHING, padded=True)
    assert_small(errors)


@pytest.mark.device
@pytest.mark.parametrize("case", ["clip", "siglip", "linear_projector"])
@every_op_set
def test_batch_without_images_gives_the_projector_zeros(case, ops):
    """Every process runs the same modules, so the gradient must exist; nothing was seen, so it is exactly zero."""
    known = reference(case, 0)
    model = build_ours(known.model, known.spec, ops=ops)
    batch = build_examples_batch(known.spec, [random_example(known.spec, (9,), 1), random_example(known.spec, (7,), 2)])
    loss = mean_loss(model, batch)
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in model.multi_modal_projector.named_parameters():
        assert parameter.grad is not None, name
        assert torch.count_nonzero(parameter.grad) == 0, name


@pytest.mark.device
def test_batch_without_images_equals_the_language_model_alone():
    known = reference("clip", 0)
    model = build_ours(known.model, known.spec)
    text_only = known.examples[2]
    assert text_only.pixels is None
    logits = model.logits(model.hidden_states(build_examples_batch(known.spec, [text_only])))
    # As for logits in test_model_forward: fp32 sums in another order.
    torch.testing.assert_close(logits.cpu(), known.logits[2], rtol=0, atol=2e-5)
    assert all(torch.isfinite(logits).flatten())
