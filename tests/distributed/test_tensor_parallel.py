"""Processes that share each matrix train as one process does.

Tolerances: fp32, and the only difference is in the order of sums over columns, heads and words. Of the runs below the
worst loss is off by 2e-7, the worst gradient by 2e-6 of its largest value, and over four steps the worst loss or norm
by 3e-7.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from transformers import PretrainedConfig, PreTrainedModel

from llava_core.backend import MaskSpec, OpSet
from llava_core.data.batch import Batch
from llava_core.engine.layout import Layout
from llava_core.engine.mesh import Mesh
from llava_core.engine.norm import clip_gradients, global_norm
from llava_core.engine.optimizer import parameter_groups
from llava_core.engine.processes import Processes
from llava_core.engine.recompute import Keeping, Recompute, arrange_layers
from llava_core.engine.shard import Sharding, shard_data
from llava_core.engine.sharded_modules import distribute
from llava_core.engine.tensor import check_tensor, shard_tensors
from llava_core.errors import ConfigError
from llava_core.model.llava import Llava
from llava_core.model.spec import ModelSpec
from llava_core.model.stage import Stage
from llava_core.testing.models import random_example, tiny_llava_config, tiny_model, tiny_text_config
from llava_core.weights.hf_config import model_spec
from tests.distributed.processes import run_processes
from tests.hardware import hardware
from tests.parity.support import EVERYTHING, build_examples_batch, build_ours

LOSS_ERROR, GRADIENT_ERROR = 1e-6, 5e-6

LANGUAGE = frozenset({"language"})
STAGE_1, STAGE_2 = frozenset({"projector"}), frozenset({"projector", "language"})

WITH_IMAGES, NO_IMAGES = ((4, 9), (3, 2, 6), (12,), (0, 5)), ((17,), (5,), (23,))
"""Texts between images. Packed: 68 tokens, which four processes share evenly, and 45, which they do not."""


def text_config(**changes: Any) -> PretrainedConfig:
    """With three layers, of which sequence parallelism splits two."""
    family = changes.pop("family", "llama")
    return tiny_text_config(family, **{"num_hidden_layers": 3, **changes})


MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "llava": lambda: tiny_llava_config(text_config()),
    "grouped": lambda: tiny_llava_config(text_config(num_key_value_heads=2)),
    # 97 words: the last process has fewer than the others
    "tied": lambda: tiny_llava_config(text_config(tie_word_embeddings=True, vocab_size=97), tie_word_embeddings=True),
    "uneven_words": lambda: tiny_llava_config(text_config(vocab_size=97)),
    "mistral_window": lambda: text_config(family="mistral", sliding_window=6, num_key_value_heads=2),
    "one_layer": lambda: text_config(num_hidden_layers=1),
}


@cache
def source(name: str) -> tuple[PreTrainedModel, ModelSpec]:
    config = MODELS[name]()
    return tiny_model(config), model_spec(config, Path(name))


def batch_of(name: str, seed: int = 0, pieces: tuple[tuple[int, ...], ...] | None = None) -> Batch:
    spec = source(name)[1]
    pieces = pieces or (WITH_IMAGES if spec.vision else NO_IMAGES)
    return build_examples_batch(spec, [random_example(spec, p, 100 * seed + i) for i, p in enumerate(pieces)])


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def tensor_mesh(size: int) -> DeviceMesh:
    return init_device_mesh(hardware().device.type, (size,), mesh_dim_names=("tp",))


def build(
    name: str, trainable: Collection[str], size: int = 1, sequence: bool = False, stage: Stage | None = None
) -> Llava:
    hf, spec = source(name)
    model = build_ours(hf, spec, trainable=trainable, stage=stage)
    if size > 1:
        shard_tensors(model, tensor_mesh(size), sequence=sequence)
    return model


def summed_loss(model: nn.Module, batch: Batch, total_labels: int) -> Tensor:
    return model(batch, torch.full((batch.counts.label_tokens,), 1 / total_labels, device=batch.tokens.device))


def backward(model: Llava, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """The mean loss and every gradient, whole."""
    loss = summed_loss(model, batch, batch.counts.label_tokens)
    loss.backward()
    return float(loss.detach()), {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def gradients(
    name: str, trainable: Collection[str], size: int = 1, sequence: bool = False, recompute: Recompute = "none"
) -> tuple[float, dict[str, Tensor]]:
    model = build(name, trainable, size, sequence)
    arrange_layers(model, Keeping(recompute))
    return backward(model, batch_of(name))


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of any gradient, as a fraction of its largest value; left out are key biases, whose exact gradient is zero."""
    assert found.keys() == expected.keys()
    compared = [n for n in expected if not n.endswith("k_proj.bias")]
    return max(float((found[n] - expected[n]).abs().max() / expected[n].abs().max()) for n in compared)


@pytest.mark.parametrize("sequence", [False, True], ids=["tensor", "sequence"])
@pytest.mark.parametrize(
    ("name", "trainable", "size"),
    [
        ("llava", EVERYTHING, 2),
        ("llava", STAGE_2, 4),
        ("llava", STAGE_1, 2),
        ("grouped", EVERYTHING, 2),
        ("grouped", STAGE_1, 2),
        ("tied", EVERYTHING, 4),
        ("uneven_words", STAGE_2, 4),
        ("mistral_window", LANGUAGE, 2),
        ("one_layer", LANGUAGE, 4),
    ],
    ids=lambda value: "+".join(sorted(value)) if isinstance(value, frozenset) else None,
)
def test_loss_and_gradients_are_those_of_one_process(
    name: str, trainable: frozenset[str], size: int, sequence: bool
) -> None:
    expected_loss, expected = gradients(name, trainable)
    for loss, found in run_processes(size, gradients, name, trainable, size, sequence):
        assert loss == pytest.approx(expected_loss, rel=LOSS_ERROR)
        assert largest_error(found, expected) < GRADIENT_ERROR


@pytest.mark.parametrize(("sequence", "recompute"), [(False, "full"), (True, "full"), (True, "selective")])
def test_recomputing_layers_changes_no_bit(sequence: bool, recompute: Recompute) -> None:
    kept = run_processes(2, gradients, "grouped", STAGE_2, 2, sequence)
    again = run_processes(2, gradients, "grouped", STAGE_2, 2, sequence, recompute)
    assert [loss for loss, _ in kept] == [loss for loss, _ in again]
    for (_, first), (_, second) in zip(kept, again, strict=True):
        assert all(torch.equal(first[n], second[n]) for n in first)


def tokens_normed(size: int) -> dict[str, int]:
    model = build("llava", STAGE_2, size, sequence=True)
    seen = {}
    for name, module in model.language_model.named_modules():
        if name.endswith("norm"):
            module.register_forward_hook(lambda _, x, __, name=name: seen.__setitem__(name, x[0].shape[1]))
    backward(model, batch_of("llava", pieces=((30,), (15,))))
    return seen


def test_each_process_norms_its_own_tokens_but_in_the_last_layer() -> None:
    labels = batch_of("llava", pieces=((30,), (15,))).counts.label_tokens
    for seen in run_processes(4, tokens_normed, 4):
        assert seen == {
            "model.layers.0.input_layernorm": 12,  # 45 tokens and 3 of padding over 4 processes
            "model.layers.0.post_attention_layernorm": 12,
            "model.layers.1.input_layernorm": 12,
            "model.layers.1.post_attention_layernorm": 12,
            "model.layers.2.input_layernorm": 45,
            "model.layers.2.post_attention_layernorm": labels,
            "model.norm": labels,
        }


def images_seen(trainable: Collection[str]) -> int:
    model = build("llava", trainable, 2, sequence=False)
    seen = []
    layer = model.vision_tower.vision_model.encoder.layers[0]
    layer.register_forward_hook(lambda _, x, __: seen.append(x[0].shape[0]))
    backward_only(model, batch_of("llava"))
    return seen[0]


@pytest.mark.parametrize(("trainable", "images"), [(STAGE_1, 2), (EVERYTHING, 4)], ids=["frozen", "trained"])
def test_a_frozen_tower_divides_the_images(trainable: frozenset[str], images: int) -> None:
    assert batch_of("llava").counts.images == 4
    assert run_processes(2, images_seen, trainable) == [images, images]


def exchanges(trainable: Collection[str], sequence: bool) -> dict[str, int]:
    model, batch = build("llava", trainable, 2, sequence), batch_of("llava")
    with CommDebugMode() as counted:
        backward_only(model, batch)
    return {str(op).rpartition(".")[2]: count for op, count in counted.get_comm_counts().items()}


def backward_only(model: Llava, batch: Batch) -> None:
    summed_loss(model, batch, batch.counts.label_tokens).backward()


def test_what_is_exchanged() -> None:
    frozen, trained = (run_processes(2, exchanges, parts, False)[0] for parts in (STAGE_1, STAGE_2))
    assert frozen == trained
    # Each of three layers adds twice forward and twice backward, the embedding once; the loss exchanges the largest
    # logits, two sums and its gradient by the hidden states; the images' features are gathered.
    assert sum(trained.values()) == 3 * 4 + 1 + 3 + 1


def test_gradients_of_split_norms_are_added_only_where_they_learn() -> None:
    frozen, trained = (run_processes(2, exchanges, parts, True)[0] for parts in (STAGE_1, STAGE_2))
    assert sum(trained.values()) - sum(frozen.values()) == 2 * 2  # two norms in each of the two split layers


def frozen_parameters(trainable: Collection[str]) -> list[str]:
    model = build("llava", trainable, 2, sequence=True)
    backward_only(model, batch_of("llava"))
    return [name for name, p in model.named_parameters() if p.requires_grad or p.grad is not None]


def test_frozen_parameters_stay_frozen() -> None:
    for names in run_processes(2, frozen_parameters, STAGE_1):
        assert {name.partition(".")[0] for name in names} == {"multi_modal_projector"}


def train(
    name: str, layout: Layout, sequence: bool = False, fused: bool = False
) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """Loss and gradient norm of four clipped steps of AdamW, on two micro-batches each, one for each data-parallel
    process where there are two; and the trained weights, whole."""
    model, mesh = build(name, STAGE_2), None
    if layout.world_size > 1:
        rank = distributed.get_rank()
        processes = Processes(rank, layout.world_size, rank, layout.world_size)
        mesh = Mesh.build(processes, layout, hardware().device.type)
        shard_tensors(model, mesh.devices["tp"], sequence=sequence)
        shard_data(model, mesh, Sharding(keep_weights=False, reduce_dtype=torch.float32))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    groups = parameter_groups(trained.items(), {"projector": 1e-3, "language": 1e-3}, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups, fused=fused)
    history = []
    for step in range(4):
        batches = [batch_of(name, 2 * step + i) for i in range(2)]
        labels = sum(batch.counts.label_tokens for batch in batches)
        total = torch.zeros((), device=hardware().device)
        for batch in batches[mesh.data_index if mesh else 0 :: layout.data]:
            loss = summed_loss(model, batch, labels)
            loss.backward()
            total += loss.detach()
        if mesh is not None:
            mesh.sum_losses(total)
        norm = global_norm(trained.values(), hardware().device)
        clip_gradients(trained.values(), norm, limit=0.5)
        optimizer.step()
        optimizer.zero_grad()
        history.append((float(total), float(norm)))
    return history, {n: whole(p) for n, p in trained.items()}


def check_training(name: str, layout: Layout, *options: bool) -> None:
    expected, weights = train(name, Layout(), False, *options[1:])
    assert expected[0][1] > 0.5, "nothing would be clipped"
    for history, found in run_processes(layout.world_size, train, name, layout, *options):
        assert history == [pytest.approx(step, rel=LOSS_ERROR) for step in expected]
        assert found.keys() == weights.keys()
        # AdamW divides each gradient by its own size, and of one near zero it makes a step of mere rounding: a few
        # values differ by a hundredth of a step, which is 4e-6 of the norm of the worst tensor.
        assert max(float((found[n] - w).norm() / w.norm()) for n, w in weights.items()) < 1e-5


@pytest.mark.parametrize("sequence", [False, True], ids=["tensor", "sequence"])
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("grouped", Layout(tensor=2)),
        ("grouped", Layout(shard=2, tensor=2)),
        ("llava", Layout(replicate=2, tensor=2)),
        ("tied", Layout(shard=2, tensor=2)),
        ("uneven_words", Layout(tensor=4)),
        ("uneven_words", Layout(shard=2, tensor=2)),
    ],
    ids=lambda value: "-".join(map(str, value.sizes)) if isinstance(value, Layout) else None,
)
def test_four_steps_are_those_of_one_process(name: str, layout: Layout, sequence: bool) -> None:
    check_training(name, layout, sequence)


def test_a_fused_optimizer_takes_the_parameters() -> None:
    check_training("grouped", Layout(shard=2, tensor=2), True, True)


def filled_later() -> tuple[float, dict[str, Any]]:
    """A model divided before it has memory, and then given its weights."""
    hf, spec = source("tied")
    weights = dict(build_ours(hf, spec, trainable=STAGE_2).named_parameters())
    with torch.device("meta"):
        model = Llava(spec, OpSet.of({}), torch.float32)
    mesh = tensor_mesh(2)
    shard_tensors(model, mesh, sequence=True)
    placements = {}
    for name, parameter in list(model.named_parameters()):
        given = weights[name]
        if isinstance(parameter, DTensor):
            (placements[name],) = parameter.placements
            given = distribute(given, mesh, placements[name])
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, given)
    return backward(model, batch_of("tied"))[0], placements


def test_a_model_without_memory_is_divided_too() -> None:
    expected, _ = gradients("tied", STAGE_2)
    for loss, placements in run_processes(2, filled_later):
        assert loss == pytest.approx(expected, rel=LOSS_ERROR)
        layer = "language_model.model.layers.1."
        assert placements[layer + "self_attn.v_proj.weight"] == Shard(0)
        assert placements[layer + "self_attn.o_proj.weight"] == Shard(1)
        assert placements[layer + "mlp.down_proj.weight"] == Shard(1)
        assert placements[layer + "input_layernorm.weight"] == Replicate()
        assert placements["language_model.model.embed_tokens.weight"] == Shard(0)
        assert all(name.startswith("language_model.") for name in placements)


def through_last_stage(size: int = 1) -> tuple[Tensor, Tensor]:
    """What the last two layers make of a stream, and the gradient that they give it."""
    model = build("llava", STAGE_2, stage=Stage(range(1, 3), 3))
    decoder = model.language_model.model
    if size > 1:
        shard_tensors(model, tensor_mesh(size), sequence=True)
    x = torch.randn(1, 45, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    out = decoder(x, torch.arange(45)[None], MaskSpec.dense(causal=True))
    out.square().sum().backward()
    return out.detach(), x.grad


def test_a_stage_takes_and_gives_whole_activations() -> None:
    expected = through_last_stage()
    for found in run_processes(4, through_last_stage, 4):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def names_and_memory(size: int) -> tuple[list[str], dict[str, int]]:
    model = build("llava", STAGE_2, size, sequence=True)
    parameters = dict(model.named_parameters())
    held = {n: p.to_local().untyped_storage().nbytes() for n, p in parameters.items() if isinstance(p, DTensor)}
    return list(parameters), held


def test_names_stay_and_each_process_holds_its_shards_alone() -> None:
    whole_model = dict(build("llava", STAGE_2).named_parameters())
    for names, held in run_processes(4, names_and_memory, 4):
        assert sorted(names) == sorted(whole_model)
        for name, num_bytes in held.items():
            shards = 1 if "norm" in name else 4
            assert num_bytes == whole_model[name].numel() * 4 // shards


@pytest.mark.parametrize(
    ("size", "changes", "message"),
    [
        (8, {"num_key_value_heads": 4}, "8 processes: they cannot share 4 attention heads, 4 key/value heads evenly"),
        (4, {"num_key_value_heads": 2}, "they cannot share 2 key/value heads evenly"),
        (4, {"intermediate_size": 82}, r"they cannot share 82 feed-forward columns \(intermediate_size\) evenly"),
        (4, {"vocab_size": 9}, "with 9 words the last would have none"),
    ],
)
def test_what_processes_cannot_share_is_refused(size: int, changes: dict[str, int], message: str) -> None:
    spec = model_spec(text_config(**changes), Path("tiny"))
    with pytest.raises(ConfigError, match=message):
        check_tensor(spec, size)


def test_what_processes_can_share_is_accepted() -> None:
    check_tensor(source("uneven_words")[1], 4)
    check_tensor(source("grouped")[1], 1)


def compiled() -> tuple[float, dict[str, Tensor]]:
    torch.compiler.reset()  # a fork inherits what earlier tests compiled, and there is a limit to it
    model = build("grouped", STAGE_2, 2, sequence=True)
    for layer in model.language_model.model.layers.values():
        layer.compile(backend="aot_eager", fullgraph=True)
    return backward(model, batch_of("grouped"))


@pytest.mark.slow
def test_layers_can_be_compiled() -> None:
    expected_loss, expected = gradients("grouped", STAGE_2)
    for loss, found in run_processes(2, compiled):
        assert loss == pytest.approx(expected_loss, rel=LOSS_ERROR)
        assert largest_error(found, expected) < GRADIENT_ERROR
