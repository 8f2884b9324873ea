"""Logits and loss of packed and padded batches against transformers on the host, which gets one sample at a time."""

from __future__ import annotations

import pytest
import torch

from llava_core.model.llava import Llava
from tests.parity.support import (
    CASES,
    OP_SETS,
    SEEDS,
    build_examples_batch,
    build_ours,
    hf_inputs,
    mean_loss,
    reference,
)

# Logits of these models have a standard deviation of 1 and reach about 4. Sums of up to 80 fp32 products in another
# order, through eight layers, were measured to differ by at most 4e-6; a wrong mask, angle or layer differs by 0.1.
LOGITS_TOLERANCE = 2e-5

# The loss is a mean of about 4.5: one unit in its last place is 5e-7.
LOSS_TOLERANCE = 3e-6

every_case = pytest.mark.parametrize("case", CASES)
every_seed = pytest.mark.parametrize("seed", SEEDS)
every_op_set = pytest.mark.parametrize("ops", OP_SETS)


def logits_by_sample(model: Llava, batch, examples) -> list[torch.Tensor]:
    """Each sample's logits, without those of padding, on the host."""
    with torch.no_grad():
        logits = model.logits(model.hidden_states(batch)).cpu()
    starts = batch.cu_seqlens_host
    return [logits[start : start + example.length] for start, example in zip(starts, examples, strict=False)]


@every_case
@every_seed
@every_op_set
@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
def test_logits(case, seed, ops, padded):
    known = reference(case, seed)
    batch = build_examples_batch(known.spec, known.examples, padded=padded)
    logits = logits_by_sample(build_ours(known.model, known.spec, ops=ops), batch, known.examples)
    for ours, theirs in zip(logits, known.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=LOGITS_TOLERANCE)


@every_case
def test_reference_logits_have_unit_scale(case):
    """What makes an absolute tolerance mean something."""
    assert 0.8 < torch.cat(reference(case, 0).logits).std() < 1.25


@every_case
@every_seed
@every_op_set
@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
def test_loss(case, seed, ops, padded):
    known = reference(case, seed)
    batch = build_examples_batch(known.spec, known.examples, padded=padded)
    loss = mean_loss(build_ours(known.model, known.spec, ops=ops, trainable=()), batch)
    torch.testing.assert_close(loss.cpu(), known.loss, rtol=0, atol=LOSS_TOLERANCE)


@pytest.mark.device
@pytest.mark.parametrize("case", ["clip", "siglip", "mistral_window", "text_llama"])
@every_op_set
def test_one_sample_alone(case, ops):
    """The loss that transformers returns for its own `labels=`, as it is."""
    known = reference(case, 0)
    for example in known.examples:
        with torch.no_grad():
            theirs = known.model(**hf_inputs(known.model, example)).loss
        batch = build_examples_batch(known.spec, [example])
        loss = mean_loss(build_ours(known.model, known.spec, ops=ops, trainable=()), batch)
        torch.testing.assert_close(loss.cpu(), theirs, rtol=0, atol=LOSS_TOLERANCE)


@pytest.mark.device
def test_images_of_equal_samples_are_not_mixed_up():
    """Two samples of one text and different images, in both orders: each has its own image's logits."""
    known = reference("clip", 0)
    first, second = known.examples[0], known.examples[0]
    second = type(first)(**{**vars(first), "pixels": first.pixels.flip(-1)})
    model = build_ours(known.model, known.spec)
    forth, back = (
        logits_by_sample(model, build_examples_batch(known.spec, pair), pair)
        for pair in ([first, second], [second, first])
    )
    torch.testing.assert_close(forth[0], known.logits[0], rtol=0, atol=LOGITS_TOLERANCE)
    torch.testing.assert_close(back[1], known.logits[0], rtol=0, atol=LOGITS_TOLERANCE)
    assert (forth[1] - forth[0]).abs().max() > 0.1
