"""Which query sees which key, read off a kernel's answers.

With queries and keys of zero every visible key has the same weight; with one-hot values each output channel is the
weight of one key. So an output shows the mask itself, whatever the kernel's precision.
Shapes: B rows, Tq queries, Tk keys, N query heads, G key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava_core.backend import KernelSpec, MaskSpec
from llava_core.testing.conformance.check import CheckFailed
from llava_core.testing.conformance.subject import EITHER, Subject, determinism

NUM_HEADS = 4
NUM_KV_HEADS = (2, 4)
HEAD_DIMS = (32, 64, 128, 16)
"""The first number of key heads and head dim that a kernel serves are taken."""


@dataclass(frozen=True)
class Attention:
    """A kernel that agreed to serve a mask, ready to be called."""

    subject: Subject
    kernel: KernelSpec
    dtype: torch.dtype
    function: Callable[..., Tensor]
    head_dim: int
    num_kv_heads: int

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec) -> Tensor:
        """Inputs on the host -> output on the device."""
        moved = (x.to(self.subject.device, self.dtype) for x in (q, k, v))
        with determinism(self.kernel.deterministic):
            return self.function(*moved, mask.to(self.subject.device), self.head_dim**-0.5)

    def weights(self, mask: MaskSpec, num_queries: int, num_keys: int, rows: int = 1) -> Tensor:
        """The attention weights [B, Tq, Tk] of queries and keys that are all alike, on the host."""
        q = torch.zeros(rows, num_queries, NUM_HEADS, self.head_dim)
        k = torch.zeros(rows, num_keys, self.num_kv_heads, self.head_dim)
        columns = []
        for start in range(0, num_keys, self.head_dim):
            identity = torch.eye(num_keys, self.head_dim + start)[:, start:]
            v = identity[None, :, None, :].expand(rows, -1, self.num_kv_heads, -1)
            out = self(q, k, v.contiguous(), mask).cpu().double()
            if not out.isfinite().all():
                raise CheckFailed("the output is not finite, though every input is")
            if not torch.equal(out, out[:, :, :1].expand_as(out)):
                raise CheckFailed("heads with the same inputs see different keys")
            columns.append(out[:, :, 0])
        return torch.cat(columns, dim=-1)[..., :num_keys]


def serve(
    subject: Subject,
    kernel: KernelSpec,
    dtype: torch.dtype,
    masks: Sequence[MaskSpec],
    *,
    keys: int,
    unequal_lengths: bool = False,
    gradients: Sequence[bool] = EITHER,
) -> Attention:
    """The kernel, if it serves every one of these masks.

    Raises:
        CheckSkipped: it refuses them with every number of heads and head dim that is tried; with its first reason.
    """
    facts = tuple(mask.facts(unequal_lengths=unequal_lengths) for mask in masks)
    described: list[dict[str, Any]] = [
        {"head_dim": head_dim, "num_heads": NUM_HEADS, "num_kv_heads": kv_heads, "masks": facts, "max_length": keys}
        for kv_heads in NUM_KV_HEADS
        for head_dim in HEAD_DIMS
    ]
    refused = [subject.refusal(kernel, dtype, sizes, gradients) for sizes in described]
    chosen = described[refused.index(None) if None in refused else 0]
    function = subject.require(kernel, dtype, chosen, gradients)
    return Attention(subject, kernel, dtype, function, chosen["head_dim"], chosen["num_kv_heads"])


def expect_visible(weights: Tensor, expected: Tensor) -> None:
    """Each query's weights are equal over exactly the keys that `expected` [B, Tq, Tk] or [Tq, Tk] says it sees.

    Raises:
        CheckFailed: naming the first query and key for which that is not so.
    """
    expected = expected.expand_as(weights)
    wrong = (weights > 0) != expected
    if wrong.any():
        row, query, key = wrong.nonzero()[0].tolist()
        sees = "does not see" if expected[row, query, key] else "sees"
        raise CheckFailed(
            f"query {query} of {weights.shape[1]} {sees} key {key} of {weights.shape[2]} in row {row}; "
            f"{int(wrong.sum())} of {wrong.numel()} pairs are wrong"
        )
    counts = expected.sum(-1, keepdim=True).clamp(min=1)
    # A weight of 1/n may be rounded to bf16 (2^-9 relative) and summed in any order.
    if float((weights * counts - expected.double()).abs().max()) > 2**-7:
        raise CheckFailed("keys with the same scores have different weights")
