"""What layers keep for the backward pass goes elsewhere, once, and comes back bit for bit."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llava_core.engine.kept import LayerMemory
from llava_core.engine.offload import on_host
from llava_core.engine.recompute import Keeping, Recompute, arrange_layers
from llava_core.engine.torch_engine import TorchEngine
from llava_core.testing.live_bytes import LiveBytes
from tests.hardware import hardware
from tests.unit.engine.support import batches, engine, examples, gradients, hf_model

EVERYTHING = ("vision", "projector", "language")
MODES = pytest.mark.parametrize("how", ["none", "selective", "full"])


def put_away(tensor: Tensor) -> Callable[[], Tensor]:
    """A store outside of torch's memory."""
    values = tensor.numpy().copy()
    return lambda: torch.tensor(values)


class Shelf:
    """A store that knows what was put into it."""

    def __init__(self) -> None:
        self.put: list[Tensor] = []
        self.fetched = 0

    def __call__(self, tensor: Tensor) -> Callable[[], Tensor]:
        self.put.append(torch.empty(0).set_(tensor.untyped_storage()))  # type: ignore[call-overload]
        back = put_away(tensor)

        def fetch() -> Tensor:
            self.fetched += 1
            return back()

        return fetch


def arranged(keeping: Keeping) -> TorchEngine:
    model, spec = hf_model(seed=8)
    trained = engine(model, spec, trainable=EVERYTHING)
    arrange_layers(trained.model, keeping)
    return trained


@MODES
def test_it_changes_no_bit_and_moves_each_tensor_once(how: Recompute) -> None:
    plain, shelf = arranged(Keeping(how)), Shelf()
    moved = arranged(Keeping(how, store=shelf))
    step = batches(examples(plain.model.spec), [3, 5])
    expected_loss, expected = gradients(plain, step)
    loss, found = gradients(moved, step)
    assert loss == expected_loss
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    addresses = [x.untyped_storage().data_ptr() for x in shelf.put]  # all are alive, so that none is given out again
    assert len(set(addresses)) == len(addresses) == shelf.fetched
    weights = {p.untyped_storage().data_ptr() for p in moved.model.parameters()}
    assert not weights & set(addresses)


@pytest.mark.device
@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_through_the_host_it_changes_no_bit(how: Recompute, dtype: torch.dtype) -> None:
    model, spec = hf_model(seed=8)
    plain, moved = (engine(model, spec, trainable=EVERYTHING, dtype=dtype) for _ in range(2))
    arrange_layers(plain.model, Keeping(how))
    arrange_layers(moved.model, Keeping(how, store=on_host(hardware())))
    for number in range(2):
        step = batches(examples(spec, seed=number), [3, 2, 3])
        assert moved.step(step, 1.0) == plain.step(step, 1.0)
    for (name, found), expected in zip(moved.model.named_parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(found, expected), name


def kept(keeping: Keeping) -> int:
    """Bytes of torch's memory that are alive between forward and backward pass."""
    trained = arranged(keeping)
    batch = batches(examples(trained.model.spec), [8])[0]
    weights = torch.full((batch.counts.label_tokens,), 1 / batch.counts.label_tokens)
    gc.collect()
    with LiveBytes("cpu") as live:
        loss = trained.model(batch, weights)
        found = live.now
        del loss
    return found


def test_it_leaves_memory() -> None:
    none, full = kept(Keeping()), kept(Keeping("full"))
    for how in ("none", "selective", "full"):
        # Less than the layers' inputs alone: what remains are statistics of rows, and what is beside the layers.
        assert kept(Keeping(how, store=put_away)) < full < none


def test_masks_indices_and_small_tensors_stay() -> None:
    shelf = Shelf()
    memory, staying = LayerMemory(shelf), torch.ones(2048, requires_grad=True)
    x, small = torch.ones(2048, requires_grad=True), torch.ones(1000, requires_grad=True)
    with memory.keeping([staying]):
        (x.masked_fill(torch.ones(2048, dtype=torch.bool), 2.0).sum() + (small * small).sum()).backward()
        ((x * staying).sum() + x[torch.arange(2048)].sum()).backward()
    assert [y.untyped_storage().data_ptr() for y in shelf.put] == [x.untyped_storage().data_ptr()]
