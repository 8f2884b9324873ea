"""What attention is asked to mask, said in words that every hardware library can be told in its own.

Libraries disagree about masks (True means attend or masked, causal is aligned top-left or bottom-right, None means
full), so the model never builds a mask tensor: it passes a `MaskSpec`, and each backend lowers it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class MaskFacts:
    """A mask's kind without its tensors: what a kernel is asked to support when the model is built.

    Attributes:
        packed: samples lie end to end and attend only within themselves.
        causal: no token attends to a later one.
        window: how many latest keys a query sees, itself included; None for all.
        key_padding: single keys are masked out by a tensor.
        unequal_lengths: there may be fewer queries than keys (decoding with a cache).
    """

    packed: bool
    causal: bool
    window: int | None = None
    key_padding: bool = False
    unequal_lengths: bool = False


@dataclass(frozen=True, eq=False)
class MaskSpec:
    """One attention call's mask.

    Queries are [B, Tq, N, H], keys [B, Tk, Nkv, H]. Causal masks are aligned at the **last** query and key (bottom
    right): query i sees keys up to i + Tk − Tq. A query that may attend to nothing yields zeros.

    Attributes:
        causal: see above.
        window: a query sees at most this many keys, the last being its own position; needs `causal`.
        cu_seqlens: [S+1] int32, packed sample boundaries (B = 1, Tq = Tk); None for dense rows.
        cu_seqlens_host: the same on the host.
        key_valid: [B, Tk] bool, True where a key may be attended to; dense rows only.
    """

    causal: bool
    window: int | None = None
    cu_seqlens: Tensor | None = None
    cu_seqlens_host: tuple[int, ...] | None = None
    key_valid: Tensor | None = None

    def __post_init__(self) -> None:
        assert (self.cu_seqlens is None) == (self.cu_seqlens_host is None), "packed masks carry both offsets"
        assert self.window is None or self.causal, "a window is only defined for causal attention"
        assert self.cu_seqlens is None or self.key_valid is None, "packed samples have no padded keys"

    @classmethod
    def packed(
        cls, cu_seqlens: Tensor, cu_seqlens_host: tuple[int, ...], *, causal: bool, window: int | None = None
    ) -> MaskSpec:
        """Samples end to end, each attending only to itself."""
        return cls(causal, window, cu_seqlens, cu_seqlens_host)

    @classmethod
    def dense(cls, *, causal: bool, window: int | None = None, key_valid: Tensor | None = None) -> MaskSpec:
        """Rows of equal length."""
        return cls(causal, window, key_valid=key_valid)

    def to(self, device: torch.device) -> MaskSpec:
        """The mask with its tensors on `device`."""
        return replace(
            self,
            cu_seqlens=None if self.cu_seqlens is None else self.cu_seqlens.to(device),
            key_valid=None if self.key_valid is None else self.key_valid.to(device),
        )

    @property
    def lengths(self) -> tuple[int, ...]:
        """Each packed sample's number of tokens."""
        assert self.cu_seqlens_host is not None
        return tuple(end - start for start, end in pairwise(self.cu_seqlens_host))

    @property
    def uniform_length(self) -> int | None:
        """The common length of packed samples, None where they differ."""
        lengths = set(self.lengths)
        return lengths.pop() if len(lengths) == 1 else None

    def facts(self, *, unequal_lengths: bool = False) -> MaskFacts:
        """This mask's kind."""
        return MaskFacts(
            packed=self.cu_seqlens is not None,
            causal=self.causal,
            window=self.window,
            key_padding=self.key_valid is not None,
            unequal_lengths=unequal_lengths,
        )
