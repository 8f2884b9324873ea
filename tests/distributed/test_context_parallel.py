"""Processes that share each packed sequence train as one process does.

Tolerances: fp32, and the only difference is in the order of sums over keys, tokens and labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from transformers import PretrainedConfig

from llava_core.backend import MaskSpec
from llava_core.backend.ops import CATALOGUE
from llava_core.config.parallel import ParallelConfig
from llava_core.data.batch import Batch, Labelled
from llava_core.data.packing import filler_batch
from llava_core.engine.context import Chunks, attend, own_labels, share_sequences
from llava_core.engine.layout import Layout
from llava_core.engine.loss import label_weights
from llava_core.engine.mesh import Mesh
from llava_core.engine.opset import Use, requests
from llava_core.engine.processes import Processes
from llava_core.engine.recompute import Keeping, Recompute, arrange_layers
from llava_core.engine.shard import Sharding
from llava_core.engine.torch_engine import TorchEngine
from llava_core.errors import ConfigError
from llava_core.testing.models import tiny_text_config
from tests.distributed.processes import run_processes
from tests.hardware import hardware
from tests.unit.engine.support import batches, engine, examples, hf_model

STEPS = 4
TOLERANCE = 1e-5
"""Relative, of loss and gradient norm, through four updates by Adam, which divides by what it sums. Measured 1e-7."""

LENGTHS = {
    "on_edges": (8, 8, 16),
    "off_edges": (5, 1, 13, 2, 12),
    "one_sample": (32,),
    "padded": (3, 30, 4),  # 37: three tokens short of an even share
    "fewer_than_chunks": (1, 2),
}


def context_mesh(size: int) -> Any:
    return init_device_mesh(hardware().device.type, (size,), mesh_dim_names=("cp",))


def packed(lengths: tuple[int, ...], window: int | None) -> MaskSpec:
    offsets = (0, *accumulate(lengths))
    return MaskSpec.packed(torch.tensor(offsets, dtype=torch.int32), offsets, causal=True, window=window)


def random_heads(num_tokens: int) -> tuple[Tensor, ...]:
    """q, k, v and the gradient of what attention makes of them: four heads, of two groups."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, num_tokens, heads, 8, generator=generator) for heads in (4, 2, 2, 4))


def shared_attention(lengths: tuple[int, ...], window: int | None) -> list[Tensor]:
    """This process's part of the result, and of the gradients of q, k and v."""
    mesh = context_mesh(distributed.get_world_size())
    chunks = Chunks.of(sum(lengths), mesh)
    q, k, v, grad = (chunks.take(x) for x in random_heads(sum(lengths)))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = attend(mesh, CATALOGUE["attention"].reference, *inputs, packed(lengths, window), 8**-0.5)
    out.backward(grad)
    return [out.detach(), *(x.grad for x in inputs)]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("window", [None, 1, 6], ids=["all", "window_1", "window_6"])
@pytest.mark.parametrize("name", LENGTHS)
def test_attention_and_its_gradients_are_those_of_one_process(name: str, window: int | None, size: int) -> None:
    lengths = LENGTHS[name]
    q, k, v, grad = random_heads(sum(lengths))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = CATALOGUE["attention"].reference(*inputs, packed(lengths, window), 8**-0.5)
    out.backward(grad)
    expected = [out.detach(), *(x.grad for x in inputs)]
    parts = run_processes(size, shared_attention, lengths, window)
    chunks = Chunks(sum(lengths), 0, size)
    for found, wanted in zip(zip(*parts, strict=True), expected, strict=True):
        whole = chunks.in_order(torch.cat(found, dim=1))[:, : sum(lengths)]
        torch.testing.assert_close(whole, wanted, rtol=1e-5, atol=1e-6)


@given(num_tokens=st.integers(1, 70), size=st.integers(1, 5))
def test_each_token_belongs_to_one_process_which_finds_it(num_tokens: int, size: int) -> None:
    x = torch.arange(1, num_tokens + 1)[None]
    shares = [Chunks(num_tokens, rank, size) for rank in range(size)]
    parts = [chunks.take(x) for chunks in shares]
    assert torch.equal(shares[0].in_order(torch.cat(parts, dim=1))[:, :num_tokens], x)
    positions = torch.arange(num_tokens)
    owned = [positions[chunks.is_own(positions)] for chunks in shares]
    assert torch.equal(torch.cat(owned).sort().values, positions)
    for chunks, part, own in zip(shares, parts, owned, strict=True):
        assert torch.equal(part[0, chunks.local(own)], own + 1)


def test_causal_work_is_even() -> None:
    seen = [Chunks(1024, rank, 4).take(torch.arange(1024)[None]).sum() for rank in range(4)]
    assert len({int(keys) for keys in seen}) == 1


def share_of_labels() -> tuple[list[int], list[int], list[float], tuple[int, ...]]:
    batch, mesh = labelled_batch(), context_mesh(2)
    weights = label_weights("sequence_mean", [batch], Labelled.of([batch]))[0]
    own, own_weights = own_labels(batch, weights, mesh)
    return own.label_index.tolist(), own.targets.tolist(), own_weights.tolist(), own.labels_per_sample


def labelled_batch() -> Batch:
    return batches(examples(hf_model()[1], 3), [3])[0]


def test_each_label_goes_to_the_process_of_the_token_before_it() -> None:
    batch = labelled_batch()
    weights = label_weights("sequence_mean", [batch], Labelled.of([batch]))[0]
    shares = run_processes(2, share_of_labels)
    expected = zip(batch.label_index.tolist(), batch.targets.tolist(), weights.tolist(), strict=True)
    assert sorted(label for share in shares for label in zip(*share[:3], strict=True)) == sorted(expected)
    assert [sum(counts) for counts in zip(*(share[3] for share in shares), strict=True)] == [*batch.labels_per_sample]


@dataclass(frozen=True)
class Case:
    """How a model is shared and what of it is trained."""

    layout: Layout
    keep_weights: bool = False
    trainable: tuple[str, ...] = ("projector", "language")
    recompute: Recompute = "none"
    compiled: bool = False
    window: int | None = None


CASES = {
    "two": Case(Layout(context=2)),
    "four": Case(Layout(context=4)),
    "data": Case(Layout(shard=2, context=2)),
    "replicas": Case(Layout(replicate=2, context=2), keep_weights=True),
    "hybrid": Case(Layout(replicate=2, shard=2, context=2)),
    "stage_1": Case(Layout(context=2), trainable=("projector",)),
    "everything": Case(Layout(context=2), trainable=("vision", "projector", "language")),
    "window": Case(Layout(context=2), window=5),
    "window_four": Case(Layout(context=4), window=9),
    "selective": Case(Layout(context=2), recompute="selective"),
    "full": Case(Layout(context=2), recompute="full"),
}


def step_batches(number: int, spec: Any) -> list[Batch]:
    """Four micro-batches, the last of text alone; of the last step, one."""
    samples = examples(spec, seed=number)
    return batches(samples, [2, 1, 2, 3]) if number < STEPS - 1 else batches(samples[:2], [2])


def build_engine(case: Case, mesh: Mesh | None) -> tuple[TorchEngine, Any]:
    model, spec = hf_model(text=None if case.window is None else mistral(case.window))
    sharding = Sharding(case.keep_weights, torch.float32)
    # Attention's reference: the kernel that this engine would choose was asked for packed masks alone.
    trained = engine(model, spec, trainable=case.trainable, mesh=mesh, sharding=sharding, reference_ops=True)
    decoder = trained.model.language_model.model
    if mesh is not None:
        share_sequences(trained.model, mesh.devices["cp"])
    arrange_layers(trained.model, Keeping(case.recompute))
    if case.compiled:
        torch.compiler.reset()  # a fork inherits what earlier tests compiled, and there is a limit to it
        for layer in decoder.layers.values():
            layer.compile(backend="aot_eager", dynamic=True)
    return trained, spec


def mistral(window: int) -> PretrainedConfig:
    """Its layers see so many tokens back."""
    return tiny_text_config("mistral", num_key_value_heads=2, sliding_window=window)


def train(case: Case, mesh: Mesh | None) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    trained, spec = build_engine(case, mesh)
    results = []
    for number in range(STEPS):
        whole = step_batches(number, spec)
        own = whole if mesh is None else share(whole, mesh)
        result = trained.step(own, 1.0, Labelled.of(whole))
        results.append((result.loss, result.grad_norm))
    return results


def share(whole: list[Batch], mesh: Mesh) -> list[Batch]:
    """This process's micro-batches, and a filler where another has one more."""
    own = whole[mesh.data_index :: mesh.layout.data]
    most = -(-len(whole) // mesh.layout.data)
    return own + [filler_batch(0, 24)] * (most - len(own))


def own_mesh(layout: Layout) -> Mesh:
    rank, size = distributed.get_rank(), distributed.get_world_size()
    return Mesh.build(Processes(rank, size, rank, size), layout, hardware().device.type)


def train_in_parallel(case: Case) -> list[tuple[float, float]]:
    return train(case, own_mesh(case.layout))


def check_steps(case: Case) -> None:
    expected = train(case, None)
    for found in run_processes(case.layout.world_size, train_in_parallel, case):
        assert found == [pytest.approx(step, rel=TOLERANCE) for step in expected]


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_one_process(name: str) -> None:
    check_steps(CASES[name])


def test_the_window_counts() -> None:
    windows = [train(Case(Layout(), window=window), None)[0] for window in (5, 9)]
    assert windows[0] != pytest.approx(windows[1], rel=100 * TOLERANCE)


@pytest.mark.slow
def test_layers_can_be_compiled() -> None:
    check_steps(Case(Layout(context=2), compiled=True))


def all_hidden_states() -> Tensor:
    mesh = own_mesh(Layout(context=2))
    trained, _ = build_engine(CASES["two"], mesh)
    with torch.no_grad():
        return trained.model.hidden_states(labelled_batch(), None)


def test_without_selected_positions_every_process_gets_all_hidden_states() -> None:
    trained, _ = build_engine(CASES["two"], None)
    with torch.no_grad():
        expected = trained.model.hidden_states(labelled_batch(), None)
    for found in run_processes(2, all_hidden_states):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def tokens_computed() -> int:
    mesh = own_mesh(Layout(context=2))
    trained, _ = build_engine(CASES["two"], mesh)
    seen: list[int] = []
    trained.model.language_model.model.layers["0"].mlp.register_forward_hook(
        lambda _, x, __: seen.append(x[0].shape[1])
    )
    with torch.no_grad():
        trained.model.hidden_states(labelled_batch(), None)
    return seen[0]


def test_each_process_computes_its_share_of_the_tokens() -> None:
    total = labelled_batch().tokens.numel()
    assert run_processes(2, tokens_computed) == [2 * -(-total // 4)] * 2


def test_kernels_are_asked_for_fewer_queries_than_keys() -> None:
    _, spec = hf_model()
    use = Use(torch.float32, frozenset({"language"}), max_length=64, deterministic=True, context=2)
    (request,) = (r for r in requests(spec, use) if r.site == "attention")
    (mask,) = request.masks
    assert (mask.packed, mask.causal, mask.unequal_lengths) == (False, True, True)


@pytest.mark.parametrize(
    ("config", "size", "layout"),
    [
        (ParallelConfig(context=2, tensor=2), 8, Layout(shard=2, context=2, tensor=2)),
        (ParallelConfig(context=2, data="replicate"), 8, Layout(replicate=4, context=2)),
        (ParallelConfig(context=2, replicas=2), 8, Layout(replicate=2, shard=2, context=2)),
        (ParallelConfig(context=4), 4, Layout(context=4)),
    ],
)
def test_what_context_leaves_is_data_parallel(config: ParallelConfig, size: int, layout: Layout) -> None:
    assert Layout.of(config, size) == layout


def test_processes_that_would_be_left_over_are_refused() -> None:
    with pytest.raises(ConfigError, match="parallel.context = 4: 6 processes do not divide by it"):
        Layout.of(ParallelConfig(context=4), 6)
