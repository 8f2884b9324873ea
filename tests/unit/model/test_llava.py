"""The model's own promises: what is computed, what keeps a graph, and what changes no number."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from llava_core.backend import OpSet
from llava_core.data.packing import build_batch
from llava_core.model.llava import Llava, splice
from llava_core.testing.models import random_example, save_folder, tiny_llava_config, tiny_model, tiny_vision_config
from llava_core.weights.load import load_model
from llava_core.weights.source import from_folder
from tests.hardware import hardware

ALL_PARTS = frozenset({"vision", "projector", "language"})
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture
def build(tmp_path: Path):
    """A tiny LLaVA by its trainable parts, dtype and config changes."""

    def build(trainable=ALL_PARTS, dtype=torch.float32, **changes) -> Llava:
        folder = save_folder(tiny_model(tiny_llava_config(**changes)), tmp_path / "llava")
        source = from_folder(folder)
        return load_model(
            source, OpSet.of({}), compute_dtype=dtype, device=hardware().device, trainable=frozenset(trainable)
        )

    return build


def batch_of(model: Llava, *pieces: tuple[int, ...]):
    examples = [random_example(model.spec, lengths, seed) for seed, lengths in enumerate(pieces)]
    return build_batch(examples, pad_id=0, image_size=model.spec.vision.image_size).to(hardware().device)


def mixed_batch(model: Llava):
    return batch_of(model, (4, 9), (3, 2, 6), (12,))


def loss_and_gradients(model: Llava, batch):
    model.zero_grad(set_to_none=True)
    num_labels = batch.counts.label_tokens
    loss = model(batch, torch.full((num_labels,), 1 / num_labels, device=hardware().device))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def count_calls(modules) -> Counter[int]:
    """How often each module is started from now on, by its index. (A recomputation may stop before a module's end.)"""
    calls: Counter[int] = Counter()
    for i, module in enumerate(modules):
        module.register_forward_pre_hook(lambda *_, i=i: calls.update([i]))
    return calls


@pytest.mark.device
def test_selected_hidden_states_equal_the_full_ones(build):
    model = build()
    batch = mixed_batch(model)
    with torch.no_grad():
        full = model.hidden_states(batch)
        selected = model.hidden_states(batch, batch.label_index)
    # Matrix products of fewer rows may be summed in another order: some units in the last place of values near 4.
    torch.testing.assert_close(selected, full[batch.label_index], rtol=0, atol=4e-6)


@pytest.mark.device
def test_no_position_selected(build):
    model = build()
    batch = mixed_batch(model)
    assert model.hidden_states(batch, batch.label_index[:0]).shape == (0, 64)


@pytest.mark.device
def test_loss_is_the_weighted_sum(build):
    """Weights of two samples apart give the parts of the sum."""
    model = build()
    batch = mixed_batch(model)
    weights = torch.rand(batch.counts.label_tokens).to(hardware().device)
    first = torch.zeros_like(weights)
    first[: batch.labels_per_sample[0]] = weights[: batch.labels_per_sample[0]]
    with torch.no_grad():
        whole = model(batch, weights)
        parts = model(batch, first) + model(batch, weights - first)
    torch.testing.assert_close(whole, parts)


@pytest.mark.device
def test_batch_without_labels_has_zero_loss_and_gradients(build):
    model = build()
    example = random_example(model.spec, (4, 9))
    example.supervised.zero_()
    batch = build_batch([example], pad_id=0, image_size=24).to(hardware().device)
    loss = model(batch, torch.zeros(0, device=hardware().device))
    loss.backward()
    assert loss == 0
    assert torch.count_nonzero(model.multi_modal_projector.linear_1.weight.grad) == 0


def test_a_frozen_tower_keeps_no_graph(build):
    model = build({"projector", "language"})
    seen = []
    model.vision_tower.register_forward_hook(lambda module, inputs, output: seen.append(output))
    mixed = mixed_batch(model)
    assert model.hidden_states(mixed).grad_fn is not None
    assert seen[0].grad_fn is None
    assert not seen[0].requires_grad


def test_a_trained_tower_keeps_its_graph(build):
    model = build({"vision"})
    seen = []
    model.vision_tower.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.hidden_states(mixed_batch(model))
    assert seen[0].grad_fn is not None


@pytest.mark.device
def test_only_the_projector_gets_gradients(build):
    model = build({"projector"})
    _, gradients = loss_and_gradients(model, mixed_batch(model))
    assert set(gradients) == {f"multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}


@pytest.mark.parametrize(("feature_layer", "run"), [(-1, 4), (-2, 3), (-4, 1), (2, 2), (0, 0)])
def test_layers_after_the_features_are_not_run(build, feature_layer, run):
    model = build({"projector"}, vision_feature_layer=feature_layer)
    calls = count_calls(model.vision_tower.vision_model.encoder.layers)
    loss_and_gradients(model, mixed_batch(model))
    assert [calls[i] for i in range(4)] == [1] * run + [0] * (4 - run)


def test_the_towers_last_norm_is_not_run(build):
    model = build()
    calls = count_calls([model.vision_tower.vision_model.post_layernorm])
    loss_and_gradients(model, mixed_batch(model))
    assert calls[0] == 0


def test_tower_runs_once_without_images(build):
    """So that every process of a sharded run takes part in the same collectives."""
    model = build({"projector"})
    calls = count_calls([model.vision_tower, model.multi_modal_projector])
    loss_and_gradients(model, batch_of(model, (7,), (3,)))
    assert calls == {0: 1, 1: 1}


@pytest.mark.device
def test_the_pixels_of_the_stand_in_image_change_nothing(build):
    model = build()
    batch = batch_of(model, (7,), (3,))
    expected, _ = loss_and_gradients(model, batch)
    batch.pixels.fill_(3.0)
    assert torch.equal(loss_and_gradients(model, batch)[0], expected)


def test_full_selection_keeps_the_class_token(build):
    model = build(vision_feature_select_strategy="full")
    assert model.vision_tower(torch.zeros(2, 3, 24, 24, device=hardware().device)).shape == (2, 10, 32)


def test_siglip_has_no_class_token(build):
    model = build(vision=tiny_vision_config("siglip"), vision_feature_select_strategy="full")
    assert model.vision_tower(torch.zeros(2, 3, 24, 24, device=hardware().device)).shape == (2, 9, 32)


@pytest.mark.device
def test_splice_puts_rows_in_their_places():
    device = hardware().device
    x = torch.zeros(7, 2, device=device)
    features = torch.arange(1.0, 9.0).reshape(4, 2).to(device)
    spliced = splice(x, features, torch.tensor([5, 6, 1, 2], device=device))
    assert spliced[:, 0].tolist() == [0, 5, 7, 0, 0, 1, 3]
    assert not x.any(), "the embeddings are not written to"
