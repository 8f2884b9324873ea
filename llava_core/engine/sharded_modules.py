"""The language model's modules over shards of their parameters. Each keeps its parameters' names.

Shapes: K supervised positions, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from llava_core.engine.exchange import ADDEND, WHOLE, add_gradients, exchange
from llava_core.engine.vocabulary_loss import linear_cross_entropy
from llava_core.model.layers import Linear, RmsNorm

OUTPUTS, INPUTS = Shard(0), Shard(1)
"""Which dim of a matrix [outputs, inputs] is divided."""


def shard_rows(total: int, size: int) -> int:
    """Rows of every shard but the last ones, which may have fewer."""
    return -(-total // size)


@dataclass(frozen=True)
class VocabularyLoss:
    """The linear_cross_entropy op for a head of which each process has some rows."""

    mesh: DeviceMesh

    def __call__(self, hidden: Tensor, weight: DTensor, targets: Tensor, weights: Tensor) -> Tensor:
        words = shard_rows(weight.shape[0], self.mesh.size())
        first_word = self.mesh.get_local_rank() * words
        return linear_cross_entropy(hidden, weight.to_local(), targets, weights, first_word, words, self.mesh)


class ShardedLinear(Linear):
    """A linear layer's own columns or rows: [..., its inputs] -> [..., its outputs], of rows an addend."""

    @classmethod
    def of(cls, linear: Linear, mesh: DeviceMesh, placement: Placement) -> ShardedLinear:
        assert [name for name, _ in linear.named_parameters()] == ["weight"], "a bias would be added by each process"
        with torch.device("meta"):
            sharded = cls(linear.in_features, linear.out_features, bias=False)
        sharded.weight = distribute(linear.weight, mesh, placement)
        return sharded

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.cast(local(self.weight), x.dtype))


class ReplicatedNorm(RmsNorm):
    """The norm that every process has, of all tokens or, `split`, of its own, in which case its gradients are added."""

    mesh: DeviceMesh
    split: bool

    @classmethod
    def of(cls, norm: RmsNorm, mesh: DeviceMesh, *, split: bool) -> ReplicatedNorm:
        replicated = cls(norm.weight.numel(), norm.eps, norm.ops)
        replicated.weight = distribute(norm.weight, mesh, Replicate())
        replicated.mesh, replicated.split = mesh, split
        return replicated

    def forward(self, x: Tensor) -> Tensor:
        weight = local(self.weight)
        return self.ops.rms_norm(x, add_gradients(weight, self.mesh) if self.split else weight, self.eps)


class VocabularyEmbedding(nn.Embedding):
    """Token ids [...] -> embeddings [..., D]; each process has the rows of its own words."""

    mesh: DeviceMesh

    @classmethod
    def of(cls, embedding: nn.Embedding, mesh: DeviceMesh) -> VocabularyEmbedding:
        with torch.device("meta"):
            sharded = cls(embedding.num_embeddings, embedding.embedding_dim)
        sharded.weight = distribute(embedding.weight, mesh, OUTPUTS)
        sharded.mesh = mesh
        return sharded

    def forward(self, tokens: Tensor) -> Tensor:
        weight = local(self.weight)
        rows = tokens - self.mesh.get_local_rank() * shard_rows(self.num_embeddings, self.mesh.size())
        mine = (rows >= 0) & (rows < weight.shape[0])
        found = F.embedding(rows.where(mine, 0), weight).masked_fill(~mine[..., None], 0.0)
        return exchange(found, self.mesh, ADDEND, WHOLE)


def distribute(parameter: Tensor, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    """This process' shard of a parameter that every process has, in memory of its own; needs no communication."""
    shard = parameter.detach()
    if isinstance(placement, Shard):
        chunks = shard.chunk(mesh.size(), placement.dim)
        shard = chunks[mesh.get_local_rank()].clone(memory_format=torch.contiguous_format)
    whole = {"shape": parameter.shape, "stride": parameter.stride()}
    sharded = DTensor.from_local(shard, mesh, (placement,), run_check=False, **whole)  # type: ignore[arg-type]
    return nn.Parameter(sharded, parameter.requires_grad)


def local(weight: Tensor) -> Tensor:
    """A sharded parameter as the plain tensor that this process computes with."""
    assert isinstance(weight, DTensor), "set by hand: a parameter of a sharded module is a DTensor"
    return weight.to_local()
