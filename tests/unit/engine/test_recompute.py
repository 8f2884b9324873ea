"""What is computed again gives the same bits, in less memory, in the layers that were asked to."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from llava_core.data.batch import Batch
from llava_core.engine import recompute
from llava_core.engine.kept import LayerMemory, Recall
from llava_core.engine.recompute import Keeping, Recompute, arrange_layers
from llava_core.engine.torch_engine import TorchEngine
from llava_core.testing.live_bytes import LiveBytes
from llava_core.testing.models import tiny_text_config
from tests.unit.engine.support import batches, engine, examples, hf_model

SPLIT = [3, 2, 3]
STAGE_2, EVERYTHING = ("projector", "language"), ("vision", "projector", "language")
AGAIN = pytest.mark.parametrize("how", ["selective", "full"])


def arranged(keeping: Keeping, trainable: Collection[str] = STAGE_2, dtype: torch.dtype = torch.float32) -> TorchEngine:
    model, spec = hf_model(seed=8, text=tiny_text_config(num_hidden_layers=3))
    trained = engine(model, spec, trainable=trainable, dtype=dtype)
    arrange_layers(trained.model, keeping)
    return trained


def micro_batches(trained: TorchEngine, seed: int = 0) -> list[Batch]:
    return batches(examples(trained.model.spec, seed=seed), SPLIT)


@AGAIN
@pytest.mark.device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trainable", [("projector",), EVERYTHING], ids=["projector", "everything"])
def test_it_changes_no_bit(how: Recompute, dtype: torch.dtype, trainable: tuple[str, ...]) -> None:
    plain, again = (arranged(Keeping(mode), trainable, dtype) for mode in ("none", how))
    for number in range(2):
        step = micro_batches(plain, seed=number)
        assert again.step(step, 1.0) == plain.step(step, 1.0)
    for (name, found), expected in zip(again.model.named_parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(found, expected), name


def count_calls(trained: TorchEngine, part: str) -> Counter[str]:
    """How often one part of each layer computes from now on, by the layer's name."""
    calls: Counter[str] = Counter()
    for name, module in trained.model.named_modules():
        layer, _, leaf = name.rpartition(f".{part}")
        if layer and not leaf:
            module.forward = counting(module.forward, calls, layer.removeprefix("language_model.model."))
    return calls


def counting(forward: Callable[..., Any], calls: Counter[str], name: str) -> Callable[..., Any]:
    def counted(*arguments: Any) -> Any:
        calls[name] += 1
        return forward(*arguments)

    return counted


@pytest.mark.parametrize(
    ("keeping", "norms", "attentions"),
    [
        (Keeping("none"), [1, 1, 1], [1, 1, 1]),
        (Keeping("selective"), [2, 2, 2], [1, 1, 1]),
        (Keeping("full"), [2, 2, 2], [2, 2, 2]),
        (Keeping("selective", num_layers=2), [2, 2, 1], [1, 1, 1]),
        (Keeping("full", num_layers=1), [2, 1, 1], [2, 1, 1]),
    ],
    ids=str,
)
def test_what_is_computed_again_in_which_layers(keeping: Keeping, norms: list[int], attentions: list[int]) -> None:
    for part, expected in (("input_layernorm", norms), ("self_attn", attentions)):
        trained = arranged(Keeping())
        calls = count_calls(trained, part)  # before the layers are arranged, so that what is done again counts
        arrange_layers(trained.model, keeping)
        trained.step(micro_batches(trained)[:1], 1.0)
        assert [calls[f"layers.{i}"] for i in range(3)] == expected


@AGAIN
def test_a_tower_that_learns_is_recomputed_too(how: Recompute) -> None:
    trained = arranged(Keeping(), EVERYTHING)
    calls = count_calls(trained, "layer_norm2")
    arrange_layers(trained.model, Keeping(how))
    trained.step(micro_batches(trained)[:1], 1.0)
    run = [f"vision_tower.vision_model.encoder.layers.{i}" for i in range(trained.model.spec.vision.num_layers_run)]
    assert calls == dict.fromkeys(run, 2)


def kept_and_left(keeping: Keeping, dtype: torch.dtype = torch.bfloat16) -> tuple[int, int]:
    """Bytes alive between forward and backward pass, and after it."""
    trained = arranged(keeping, dtype=dtype)
    batch = micro_batches(trained)[0]
    weights = torch.full((batch.counts.label_tokens,), 1 / batch.counts.label_tokens)
    gc.collect()
    gc.disable()  # nothing may wait for the collector: on a device, its memory would fill up before
    try:
        with LiveBytes("cpu") as live:
            loss = trained.model(batch, weights)
            kept = live.now
            loss.backward()
            return kept, live.now
    finally:
        gc.enable()


def test_the_more_is_recomputed_the_less_is_kept() -> None:
    none, selective, full = (kept_and_left(Keeping(how))[0] for how in ("none", "selective", "full"))
    first, last = kept_and_left(Keeping("full", num_layers=1))[0], kept_and_left(Keeping("full", num_layers=3))[0]
    assert full < selective < none
    assert full == last < first < none
    # A layer keeps its input, here of three, and beside the layers there are the embeddings and the loss's gradients.
    assert full < 0.4 * none
    assert selective < 0.6 * none


@AGAIN
def test_nothing_is_left_after_the_backward_pass(how: Recompute) -> None:
    assert kept_and_left(Keeping(how))[1] == kept_and_left(Keeping())[1]


def test_without_gradients_nothing_is_kept() -> None:
    trained = arranged(Keeping("selective"))
    with torch.no_grad(), LiveBytes("cpu") as live:
        hidden = trained.model.hidden_states(micro_batches(trained)[0])
        del hidden
        assert live.now == 0


def saved_by_compiled_layers(keeping: Keeping, trained: TorchEngine) -> tuple[float, int]:
    """The loss, and the bytes of activations that autograd saves; of a compiled function it is told what is kept."""
    torch.compiler.reset()
    arrange_layers(trained.model, keeping)
    batch = micro_batches(trained)[0]
    weights = torch.full((batch.counts.label_tokens,), 1 / batch.counts.label_tokens)
    staying = {p.untyped_storage().data_ptr() for p in trained.model.parameters()}
    saved: dict[int, Tensor] = {}
    with saved_tensors_hooks(lambda x: saved.setdefault(x.untyped_storage().data_ptr(), x), lambda x: x):
        loss = trained.model(batch, weights)
    return float(loss.detach()), sum(
        x.untyped_storage().nbytes() for address, x in saved.items() if address not in staying
    )


@pytest.mark.slow
def test_compiled_layers_keep_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    # It divides graphs as the usual compiler does, and runs them as they are: no C++ compiler takes its minutes.
    monkeypatch.setattr(recompute, "COMPILER", "aot_eager_decomp_partition")
    modes = {"none": Keeping(), "selective": Keeping("selective"), "first": Keeping("selective", num_layers=1)}
    found = {
        name: saved_by_compiled_layers(replace(keeping, compiled=True), arranged(Keeping()))
        for name, keeping in modes.items()
    }
    kept = {name: saved for name, (_, saved) in found.items()}
    assert kept["selective"] < kept["first"] < kept["none"]
    assert kept["selective"] < kept_and_left(Keeping("selective"), torch.float32)[0]
    assert found["selective"][0] == pytest.approx(found["none"][0], rel=1e-6)
    torch.compiler.reset()


# ---- one step of a layer, seen from near


def forget(step: Callable[..., Tensor], *arguments: Tensor) -> tuple[Tensor, LayerMemory]:
    memory = LayerMemory(None)
    with memory.keeping(()):
        return memory.forgetting(step)(*arguments), memory


def test_a_step_is_done_once_more_however_many_use_its_result() -> None:
    calls = 0

    def step(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x.exp().sin()

    x = torch.linspace(0, 1, 8, requires_grad=True)
    memory = LayerMemory(None)
    with memory.keeping(()):
        y = memory.forgetting(step)(x)
        result = (y * y).sum() + (y.view(2, 4)[:, 1:] ** 3).sum()
    result.backward()
    z = x.detach().clone().requires_grad_()
    w = z.exp().sin()
    ((w * w).sum() + (w.view(2, 4)[:, 1:] ** 3).sum()).backward()
    assert torch.equal(x.grad, z.grad)
    assert calls == 2


def test_a_result_that_was_changed_is_kept_as_it_is() -> None:
    x = torch.ones(4, requires_grad=True)
    memory = LayerMemory(None)
    with memory.keeping(()):
        y = memory.forgetting(lambda x: x * 2)(x)
        with torch.no_grad():
            y.add_(1)
        result = (y * y).sum()
    result.backward()
    assert torch.equal(x.grad, torch.full((4,), 2 * 3 * 2.0))


def test_a_step_that_hands_on_its_argument() -> None:
    x = torch.ones(4, requires_grad=True)
    y, _ = forget(lambda x: x.view(2, 2), x)
    (y * y).sum().backward()
    assert torch.equal(x.grad, torch.full((4,), 2.0))


def test_what_is_recalled_is_let_go_after_the_last_of_those_that_wait() -> None:
    made: list[int] = []
    recall = Recall(lambda: made.append(1) or (torch.ones(1),))
    recall.promise()
    recall.promise()
    assert recall.take()[0] is recall._made[0]
    recall.take()
    assert recall._made is None
    assert made == [1]
