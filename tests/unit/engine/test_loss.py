"""The three ways to weight a step's tokens, against transformers' losses put together by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from llava_core.data.batch import Example, Labelled
from llava_core.engine.loss import LossMode, label_weights
from llava_core.testing.models import classic_name
from tests.unit.engine.support import batches, engine, examples, gradients, hf_inputs, hf_model, largest_error

SPLITS = ([8], [1] * 8, [2, 3, 3], [7, 1])
MODES: tuple[LossMode, ...] = ("token_mean", "micro_batch_mean", "sequence_mean")

# fp32 sums over up to 8 micro-batches in another order. A gradient's error is a fraction of the largest of its tensor.
# Measured 1e-7 and 1.1e-6.
LOSS_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 1e-5


def hf_loss(model: nn.Module, samples: list[Example], mode: LossMode, split: list[int]) -> Tensor:
    """The step's loss from transformers' mean loss of each sample."""
    means, counts = [model(**hf_inputs(sample)).loss for sample in samples], [s.num_labels for s in samples]
    if mode == "sequence_mean":
        return sum(means) / len(samples)
    total, start = torch.zeros(()), 0
    for size in split:
        members = range(start, start + size)
        tokens = sum(means[i] * counts[i] for i in members)
        # The mean of each micro-batch over the number of micro-batches is how the original's trainer accumulates.
        total += tokens / (sum(counts) if mode == "token_mean" else sum(counts[i] for i in members) * len(split))
        start += size
    return total


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("split", [*SPLITS[:2], pytest.param(SPLITS[2], marks=pytest.mark.device), SPLITS[3]], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_loss_and_gradients_are_transformers(mode: LossMode, split: list[int], padded: bool) -> None:
    model, spec = hf_model(seed=3)
    samples = examples(spec)
    ours = engine(model, spec, loss=mode)
    loss, grads = gradients(ours, batches(samples, split, padded=padded))
    expected = hf_loss(model, samples, mode, split)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=LOSS_TOLERANCE)
    named = {classic_name(model, name): p.grad for name, p in model.named_parameters()}
    assert largest_error(grads, {name: named[name] for name in grads}) < GRADIENT_TOLERANCE


@pytest.mark.parametrize("mode", [pytest.param("token_mean", marks=pytest.mark.device), "sequence_mean"])
def test_how_samples_are_split_changes_nothing(mode: LossMode) -> None:
    model, spec = hf_model(seed=4)
    samples = examples(spec)
    ours = engine(model, spec, loss=mode)
    whole_loss, whole = gradients(ours, batches(samples, [8]))
    for split in SPLITS[1:]:
        loss, grads = gradients(ours, batches(samples, split))
        assert loss == pytest.approx(whole_loss, rel=LOSS_TOLERANCE)
        assert largest_error(grads, whole) < GRADIENT_TOLERANCE


def test_the_modes_differ_where_they_should() -> None:
    model, spec = hf_model(seed=4)
    step = batches(examples(spec), [2, 3, 3])
    assert len({round(gradients(engine(model, spec, loss=mode), step)[0], 5) for mode in MODES}) == 3


@pytest.mark.parametrize("mode", MODES)
def test_weights_sum_to_one_over_the_step(mode: LossMode) -> None:
    _, spec = hf_model()
    step = batches(examples(spec), [2, 3, 3])
    weights = label_weights(mode, step, Labelled.of(step))
    assert sum(float(w.double().sum()) for w in weights) == pytest.approx(1, abs=1e-6)  # fp32 weights


def test_weights_by_hand() -> None:
    _, spec = hf_model()
    samples = examples(spec, 3)
    first, second, third = (sample.num_labels for sample in samples)
    step = batches(samples, [2, 1])
    every = first + second + third
    assert [w.tolist() for w in label_weights("token_mean", step, Labelled.of(step))] == [
        pytest.approx([1 / every] * (first + second)),
        pytest.approx([1 / every] * third),
    ]
    micro = label_weights("micro_batch_mean", step, Labelled.of(step))
    assert micro[0].tolist() == pytest.approx([1 / (first + second) / 2] * (first + second))
    assert micro[1].tolist() == pytest.approx([1 / third / 2] * third)
    sequence = label_weights("sequence_mean", step, Labelled.of(step))
    assert sequence[0].tolist() == pytest.approx([1 / first / 3] * first + [1 / second / 3] * second)
    assert sequence[1].tolist() == pytest.approx([1 / third / 3] * third)
