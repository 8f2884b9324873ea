"""Context parallelism: several processes share each packed sequence, and with it the memory and work of its tokens.

The tokens of a micro-batch, padded at the end, are cut into twice as many equal chunks as there are processes, and each
process has one from either end: a late token attends to more than an early one, so that the work is even. Between the
embedding and the loss each token is computed by its process alone. Only in attention do they meet: keys and values are
gathered, and their gradients added, while queries stay where they are.

Embedding, vision tower and projector run over the whole micro-batch in every process, and what they give is cut
afterwards: no process need know whose tokens an image lies on, and each adds the gradient of its own tokens. It costs
the tower's work in every process, which beside a decoder over sequences that are worth sharing is small.

All sizes follow from the samples' lengths on the host: nothing waits for the device.

Shapes: T tokens of a micro-batch, C tokens of a chunk, D width, N query heads, G key/value heads, H head dim, K labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from llava_core.backend import MaskSpec
from llava_core.data.batch import Batch
from llava_core.engine.exchange import ADDEND, TOKENS, WHOLE, exchange
from llava_core.model.decoder import Decoder
from llava_core.model.llava import Llava


@dataclass(frozen=True)
class Chunks:
    """Which of `num_tokens` tokens a process has.

    Attributes:
        rank, size: of this process, and how many share the tokens.
    """

    num_tokens: int
    rank: int
    size: int

    @classmethod
    def of(cls, num_tokens: int, mesh: DeviceMesh) -> Chunks:
        """This process's; `mesh` has one axis."""
        return cls(num_tokens, mesh.get_local_rank(), mesh.size())

    @property
    def length(self) -> int:
        """Tokens of each chunk; the last ones may be padding."""
        return -(-self.num_tokens // (2 * self.size))

    @property
    def own(self) -> tuple[int, int]:
        """The process's two chunks."""
        return self.rank, 2 * self.size - 1 - self.rank

    def take(self, x: Tensor) -> Tensor:
        """What this process has of [1, T, …]: [1, 2C, …], zeros where there is no token."""
        missing = 2 * self.size * self.length - self.num_tokens
        padded = F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing))
        first, second = (padded.narrow(1, chunk * self.length, self.length) for chunk in self.own)
        return torch.cat((first, second), dim=1)

    def in_order(self, gathered: Tensor) -> Tensor:
        """The parts of all processes [1, 2C·size, …], by rank, as they lie in the sequence."""
        parts = gathered.split(self.length, dim=1)
        return torch.cat((*parts[::2], *parts[::-2]), dim=1)

    def is_own(self, positions: Tensor) -> Tensor:
        """Whether this process has the tokens at these positions of the sequence."""
        chunk = positions // self.length
        return (chunk == self.own[0]) | (chunk == self.own[1])

    def local(self, positions: Tensor) -> Tensor:
        """Positions of this process's tokens in the sequence -> in its part."""
        first, second = self.own
        in_first = positions < (first + 1) * self.length
        return positions - torch.where(in_first, first, second - 1) * self.length


def own_labels(batch: Batch, label_weights: Tensor, mesh: DeviceMesh) -> tuple[Batch, Tensor]:
    """The micro-batch with those of its labels, and their weights [K], whose predecessors this process computes.

    On the host, where selecting does not wait for the device.
    """
    own = Chunks.of(batch.cu_seqlens_host[-1], mesh).is_own(batch.label_index)
    kept = replace(
        batch,
        label_index=batch.label_index[own],
        targets=batch.targets[own],
        labels_per_sample=tuple(int(part.sum()) for part in own.split(list(batch.labels_per_sample))),
    )
    return kept, label_weights[own]


def share_sequences(model: Llava, mesh: DeviceMesh) -> None:
    """Have the decoder's layers compute only this process's tokens, in place.

    The decoder is given whole micro-batches, and selected positions that are this process's (`own_labels`); without
    any it gives the hidden states of all tokens. Between the stages of a pipeline each process's tokens stay its own.

    Args:
        mesh: of one axis, within which each process gets the same batches.
    """
    decoder = model.language_model.model
    decoder.register_forward_pre_hook(partial(_divide, mesh))
    decoder.register_forward_hook(partial(_restore, mesh))
    for layer in decoder.layers.values():
        attention: Any = layer.self_attn
        shared = partial(attend, mesh, attention.ops.attention)
        # It reads the samples' lengths on the host; in a compiled layer, each batch's would be another graph.
        attention.ops = replace(attention.ops, attention=torch.compiler.disable(shared))


def attend(
    mesh: DeviceMesh,
    attention: Callable[[Tensor, Tensor, Tensor, MaskSpec, float], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: MaskSpec,
    scale: float,
) -> Tensor:
    """The attention op over this process's tokens as queries, and those of all processes as keys and values.

    Args:
        attention: the op for dense rows with fewer queries than keys.
        q: [1, 2C, N, H]; k and v [1, 2C, G, H].
        mask: of the whole packed micro-batch, causal.

    Returns:
        [1, 2C, N, H].
    """
    assert mask.cu_seqlens_host is not None, "sequences are shared in packed micro-batches only"
    assert mask.causal, "chunks are balanced for causal attention, and see no later one"
    chunks = Chunks.of(mask.cu_seqlens_host[-1], mesh)
    both = exchange(torch.cat((k, v), dim=2), mesh, TOKENS, WHOLE, gradient=ADDEND)
    keys, values = chunks.in_order(both).chunk(2, dim=2)
    rows = MaskSpec.dense(causal=True, window=mask.window)
    pieces = [
        attention(q[:, own], keys[:, seen], values[:, seen], rows, scale)
        for own, seen in _pieces(chunks, mask.cu_seqlens_host, mask.window)
    ]
    return torch.cat(pieces, dim=1)


def _pieces(chunks: Chunks, cu_seqlens: tuple[int, ...], window: int | None) -> Iterator[tuple[slice, slice]]:
    """Each run of queries of one sample in one chunk, in the process's part, and the keys, in the sequence, up to the
    last query's own that any of them sees. Padding is a sample of its own."""
    samples = list(pairwise((*cu_seqlens, 2 * chunks.size * chunks.length)))
    for place, chunk in enumerate(chunks.own):
        start, end = chunk * chunks.length, (chunk + 1) * chunks.length
        shift = place * chunks.length - start
        for sample_start, sample_end in samples:
            first, last = max(sample_start, start), min(sample_end, end)
            if first < last:
                seen = sample_start if window is None else max(sample_start, first - window + 1)
                yield slice(first + shift, last + shift), slice(seen, last)


def _divide(mesh: DeviceMesh, decoder: Decoder, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Before the decoder: embeddings [1, T, D], positions [1, T] and selected positions become this process's."""
    x, positions, mask, cache, select = arguments
    assert cache is None, "sequences are shared in training only"
    chunks = Chunks.of(mask.cu_seqlens_host[-1], mesh)
    local = None if select is None else chunks.local(select)
    return chunks.take(x) if decoder.stage.is_first else x, chunks.take(positions), mask, cache, local


def _restore(mesh: DeviceMesh, decoder: Decoder, arguments: tuple[Any, ...], hidden: Tensor) -> Tensor:
    """After the decoder: hidden states that were not selected become those of all tokens, [1, T, D]."""
    _, _, mask, _, select = arguments
    if select is not None or not decoder.stage.is_last:
        return hidden
    chunks = Chunks.of(mask.cu_seqlens_host[-1], mesh)
    return chunks.in_order(exchange(hidden, mesh, TOKENS, WHOLE))[:, : chunks.num_tokens]
