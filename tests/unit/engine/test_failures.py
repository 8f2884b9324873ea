"""What is not finite: caught before the update, by the samples' names; and fp16's loss scale."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llava_core.data.batch import Example
from llava_core.engine.loss_scale import LossScale
from llava_core.engine.torch_engine import TorchEngine
from llava_core.errors import TrainingError
from tests.unit.engine.support import batches, engine, examples, hf_model

SPLIT = [3, 2, 3]


def with_nan(samples: list[Example], index: int) -> list[Example]:
    """One pixel of one sample's image is not a number."""
    pixels = samples[index].pixels
    assert pixels is not None
    spoilt = pixels.clone()
    spoilt[0, 1, 5, 7] = float("nan")
    return [replace(s, pixels=spoilt) if i == index else s for i, s in enumerate(samples)]


def everything(trained: TorchEngine) -> dict[str, torch.Tensor]:
    """All parameters, also frozen ones, and the optimizer's state."""
    parameters = {name: p.detach().clone() for name, p in trained.model.named_parameters()}
    optimizer = {n: tensor.clone() for n, tensor in trained.state()[0].items() if n.startswith("optimizer.")}
    return parameters | optimizer


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.device), 7])
def test_a_nan_in_an_image_is_caught_by_its_samples_name(index: int, padded: bool) -> None:
    model, spec = hf_model()
    trained = engine(model, spec)
    trained.step(batches(examples(spec, seed=1), SPLIT), 1.0)
    before = everything(trained)
    samples = with_nan(examples(spec), index)
    with pytest.raises(TrainingError, match="the weights are intact") as raised:
        trained.step(batches(samples, SPLIT, padded=padded), 1.0)
    assert [s.id for s in samples if f"{s.id}." in str(raised.value) or f"{s.id}," in str(raised.value)] == [
        samples[index].id
    ]
    after = everything(trained)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.device
def test_after_a_caught_nan_the_next_step_is_as_if_it_had_not_been() -> None:
    model, spec = hf_model()
    caught, plain = engine(model, spec), engine(model, spec)
    with pytest.raises(TrainingError):
        caught.step(batches(with_nan(examples(spec), 0), SPLIT), 1.0)
    step = batches(examples(spec), SPLIT)
    assert caught.step(step, 1.0) == plain.step(step, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(caught.model.parameters(), plain.model.parameters(), strict=True))


@pytest.mark.device
def test_a_nan_in_a_weight_names_every_sample_that_meets_it() -> None:
    model, spec = hf_model()
    trained = engine(model, spec)
    samples = examples(spec)
    with torch.no_grad():
        trained.model.multi_modal_projector.linear_1.weight[0, 0] = float("nan")
    with pytest.raises(TrainingError) as raised:
        trained.step(batches(samples, SPLIT), 1.0)
    with_images = [s.id for s in samples if s.pixels is not None]
    assert [s.id for s in samples if s.id in str(raised.value)] == with_images
    assert len(with_images) < len(samples)


@pytest.mark.device
def test_a_gradient_alone_that_is_not_finite_stops_the_run_too() -> None:
    model, spec = hf_model()
    trained = engine(model, spec)
    weight = trained.model.language_model.model.norm.weight
    weight.register_hook(lambda gradient: gradient * float("inf"))
    before = weight.detach().clone()
    samples = examples(spec)
    with pytest.raises(TrainingError, match="gradient norm (inf|nan)") as raised:
        trained.step(batches(samples, SPLIT), 1.0)
    assert all(sample.id in str(raised.value) for sample in samples)
    assert torch.equal(weight, before)


def overflowing(trained: TorchEngine, times: int) -> None:
    """The gradient of one weight is infinite in the next backward passes."""
    left = [times]

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        left[0] -= 1
        return gradient * float("inf") if left[0] >= 0 else gradient

    trained.model.language_model.model.norm.weight.register_hook(spoil)


@pytest.mark.device
def test_fp16_overflow_skips_the_update_halves_the_scale_and_recovers() -> None:
    model, spec = hf_model()
    trained = engine(model, spec, dtype=torch.float16)
    step = batches(examples(spec), [8])
    overflowing(trained, 1)
    assert trained.loss_scale is not None
    before, scale = everything(trained), trained.loss_scale.scale
    first = trained.step(step, 1.0)
    assert first.skipped
    assert trained.loss_scale.scale == scale / 2
    after = everything(trained)
    assert all(torch.equal(after[name], before[name]) for name in before if not name.startswith("optimizer."))
    second = trained.step(step, 1.0)
    assert not second.skipped
    assert not torch.equal(trained.model.language_model.lm_head.weight, before["language_model.lm_head.weight"])
    # fp16 roundings of up to 0.05 %, averaged over tokens; measured 0.006 %.
    assert second.loss == pytest.approx(engine(model, spec).step(step, 1.0).loss, rel=5e-4)


@pytest.mark.device
def test_the_loss_scale_does_not_change_the_update() -> None:
    model, spec = hf_model()
    step = batches(examples(spec), [8])
    results = []
    for scale in (2.0**8, 2.0**12):  # powers of two: exact, as long as nothing overflows or underflows
        trained = engine(model, spec, dtype=torch.float16)
        trained.loss_scale = LossScale(scale)
        results.append(trained.step(step, 1.0).grad_norm)
    assert results[0] == pytest.approx(results[1], rel=1e-3)


@pytest.mark.device
def test_fp16_that_overflows_at_any_scale_stops_the_run() -> None:
    model, spec = hf_model()
    trained = engine(model, spec, dtype=torch.float16)
    overflowing(trained, 10**6)
    step = batches(examples(spec), [8])
    while trained.loss_scale is not None and trained.loss_scale.scale > 1:
        assert trained.step(step, 1.0).skipped
    with pytest.raises(TrainingError, match="overflow even at a loss scale of 0.5"):
        trained.step(step, 1.0)
