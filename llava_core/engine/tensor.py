"""Tensor and sequence parallelism: several processes share each matrix of the language model.

Each process computes some of the attention heads, of the feed-forward's columns and of the vocabulary, on plain
tensors, and the results are added. Only the parameters know that they are shards: they are DTensors, for sharding,
checkpoints and exports to act on.

With sequence parallelism the layers' residual stream, and with it the norms, is split by tokens between these parts:
what would be one sum over the processes becomes a sum that leaves each its tokens, and a gathering before the next
part. It costs the same communication and keeps 1/n of the stream's memory. The last layer goes without: after its
attention only the supervised positions go on, often few and never evenly spread, and its norms are computed by all.

The vision tower and the projector stay whole in every process, and plain: their matrices are small, so that two sums a
layer would cost more than the multiplications saved. A frozen tower divides the images instead, which costs one
gathering. One that learns does not: its gradients would have to be added, or the images' gradients be gathered.

Shapes: B rows, T tokens, D width, I images.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from llava_core.engine.exchange import ADDEND, IMAGES, TOKENS, WHOLE, exchange
from llava_core.engine.sharded_modules import (
    INPUTS,
    OUTPUTS,
    ReplicatedNorm,
    ShardedLinear,
    VocabularyEmbedding,
    VocabularyLoss,
    shard_rows,
)
from llava_core.errors import ConfigError
from llava_core.model.decoder import DecoderLayer
from llava_core.model.llava import Llava
from llava_core.model.spec import ModelSpec


def check_tensor(spec: ModelSpec, size: int) -> None:
    """Whether `size` processes can share the language model's matrices.

    Raises:
        ConfigError: a number that they do not divide.
    """
    text = spec.text
    numbers = {
        "attention heads": text.num_heads,
        "key/value heads": text.num_kv_heads,
        "feed-forward columns (intermediate_size)": text.intermediate_size,
    }
    uneven = [f"{number} {name}" for name, number in numbers.items() if number % size]
    if uneven:
        raise ConfigError(
            f"tensor parallelism over {size} processes: they cannot share {', '.join(uneven)} evenly; take a number "
            "of processes that divides each."
        )
    if (size - 1) * shard_rows(text.vocab_size, size) >= text.vocab_size:
        raise ConfigError(
            f"tensor parallelism over {size} processes: with {text.vocab_size} words the last would have none."
        )


def shard_tensors(model: Llava, mesh: DeviceMesh, *, sequence: bool) -> None:
    """Divide the language model's parameters over `mesh`, in place, and have its modules compute with their shards.

    What the model has now is divided: of a pipeline, the parts of this stage. Activations that enter and leave its
    layers are whole. It must be known what learns (`train_only`). Parameters may be on the meta device; what is set in
    their place later must be DTensors of the same placement.

    Args:
        mesh: of one axis, within which each process gets the same batches.
        sequence: split the stream between the layers' parts by tokens, too.
    """
    check_tensor(model.spec, mesh.size())
    language = model.language_model
    decoder = language.model
    if hasattr(decoder, "embed_tokens"):
        decoder.embed_tokens = VocabularyEmbedding.of(decoder.embed_tokens, mesh)
    if hasattr(language, "lm_head"):
        language.lm_head = ShardedLinear.of(language.lm_head, mesh, OUTPUTS)
    if hasattr(decoder, "norm"):
        decoder.norm = ReplicatedNorm.of(decoder.norm, mesh, split=False)
    layers: list[Any] = list(decoder.layers.values())
    split = [sequence and layer is not layers[-1] for layer in layers]
    for layer, is_split in zip(layers, split, strict=True):
        _shard_layer(layer, mesh, split=is_split)
    if any(split):
        layers[0].register_forward_pre_hook(_Residual(mesh).divide)
        layers[-1].register_forward_pre_hook(_Residual(mesh).restore)
    model.ops = replace(model.ops, linear_cross_entropy=VocabularyLoss(mesh))
    if hasattr(model, "vision_tower") and not any(p.requires_grad for p in model.vision_tower.parameters()):
        model.vision_tower.register_forward_pre_hook(_Images(mesh).divide)
        model.vision_tower.register_forward_hook(_Images(mesh).restore)


def _shard_layer(layer: DecoderLayer, mesh: DeviceMesh, *, split: bool) -> None:
    attention, mlp = layer.self_attn, layer.mlp
    for module, names, placement in (
        (attention, ("q_proj", "k_proj", "v_proj"), OUTPUTS),
        (attention, ("o_proj",), INPUTS),
        (mlp, ("gate_proj", "up_proj"), OUTPUTS),
        (mlp, ("down_proj",), INPUTS),
    ):
        for name in names:
            setattr(module, name, ShardedLinear.of(getattr(module, name), mesh, placement))
    layer.input_layernorm = ReplicatedNorm.of(layer.input_layernorm, mesh, split=split)
    layer.post_attention_layernorm = ReplicatedNorm.of(layer.post_attention_layernorm, mesh, split=split)
    part = _Part(mesh, split)
    attention.register_forward_pre_hook(part.enter_attention)
    attention.o_proj.register_forward_hook(part.leave)
    mlp.register_forward_pre_hook(part.enter_mlp)
    mlp.register_forward_hook(part.leave)


@dataclass(frozen=True)
class _Part:
    """Hooks where the stream enters and leaves a part of a layer, in which each process has some of the columns.

    Attributes:
        split: the stream outside is split by tokens.
    """

    mesh: DeviceMesh
    split: bool

    def enter_attention(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x, angles, *rest = arguments
        num_tokens = angles[0].shape[1]  # without what was added to make the split even
        return self._enter(x)[:, :num_tokens], angles, *rest

    def enter_mlp(self, module: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        return (self._enter(arguments[0]),)

    def leave(self, module: nn.Module, arguments: Any, addend: Tensor) -> Tensor:
        if self.split:
            return exchange(_even(addend, 1, self.mesh), self.mesh, ADDEND, TOKENS)
        return exchange(addend, self.mesh, ADDEND, WHOLE)

    def _enter(self, x: Tensor) -> Tensor:
        return exchange(x, self.mesh, TOKENS if self.split else WHOLE, WHOLE, gradient=ADDEND)


@dataclass(frozen=True)
class _Residual:
    """Hooks where the split of the residual stream begins, and where it ends."""

    mesh: DeviceMesh

    def divide(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = arguments
        return exchange(_even(x, 1, self.mesh), self.mesh, WHOLE, TOKENS), *rest

    def restore(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x, angles, *rest = arguments
        return exchange(x, self.mesh, TOKENS, WHOLE)[:, : angles[0].shape[1]], angles, *rest


@dataclass(frozen=True)
class _Images:
    """Hooks around the tower: pixels [I, 3, H, W] in, features [at least I, V, D] out. Those of images that were added
    come last, and the splice takes as many as it has places for."""

    mesh: DeviceMesh

    def divide(self, module: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        return (exchange(_even(arguments[0], 0, self.mesh), self.mesh, WHOLE, IMAGES),)

    def restore(self, module: nn.Module, arguments: Any, features: Tensor) -> Tensor:
        return exchange(features, self.mesh, IMAGES, WHOLE)


def _even(x: Tensor, dim: int, mesh: DeviceMesh) -> Tensor:
    """`x` with as many rows in `dim` as the processes can share evenly, by rows of zeros, which layers keep at zero."""
    missing = -x.shape[dim] % mesh.size()
    return F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, missing)) if missing else x
