"""Which pairs of query and key `npu_fusion_attention` leaves out: sparse modes 0 to 4. True means **masked**."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ascend_simulator.contract import require, require_dtype

OP = "npu_fusion_attention"

ANY_MASK, ALL_MASK, TOP_LEFT_CAUSAL, BOTTOM_RIGHT_CAUSAL, BAND = range(5)
COMPRESSED = (TOP_LEFT_CAUSAL, BOTTOM_RIGHT_CAUSAL, BAND)
COMPRESSED_SIZE = 2048
# inner_precise: rows in which everything is masked are computed, rather than forbidden.
WITH_MASKED_ROWS = 2


@dataclass(frozen=True)
class Masking:
    """The arguments of one call that decide what is masked.

    Attributes:
        mask: bool or uint8, or None: nothing is masked, whatever the other arguments say.
        pre_tokens: in modes 0 and 4, how many keys before the diagonal are seen.
        next_tokens: likewise after it.
    """

    mask: Tensor | None
    sparse_mode: int
    pre_tokens: int
    next_tokens: int
    inner_precise: int
    packed: bool

    def check(self) -> None:
        """What does not depend on the sequences' lengths."""
        require(
            0 <= self.sparse_mode <= BAND, OP, "of the documented sparse modes, 0 to 4 are simulated", self.sparse_mode
        )
        require(self.inner_precise in (0, 1, 2), OP, "inner_precise is 0, 1 or 2", self.inner_precise)
        if self.mask is None:
            return
        require_dtype(OP, "atten_mask", self.mask, (torch.bool, torch.uint8))
        require(int(self.mask.max()) <= 1, OP, "atten_mask holds 0 (kept) and 1 (masked)", int(self.mask.max()))
        if self.sparse_mode in COMPRESSED:
            self._check_compressed()
        if self.sparse_mode in (ANY_MASK, BAND):
            found = f"pre_tockens={self.pre_tokens}, next_tockens={self.next_tokens}"
            rule = "pre_tockens and next_tockens must leave a band between them"
            require(self.pre_tokens + self.next_tokens >= 0, OP, rule, found)

    def _check_compressed(self) -> None:
        assert self.mask is not None
        shape, size = tuple(self.mask.shape), COMPRESSED_SIZE
        rule = f"sparse_mode {self.sparse_mode} takes the compressed mask of {size} × {size}"
        require(shape in ((size, size), (1, 1, size, size)), OP, rule, f"shape {shape}")
        right = torch.equal(self.mask.bool().view(size, size), _compressed_mask())
        require(right, OP, "the compressed mask is triu(1): True above the diagonal, which is masked", "other values")

    def masked_pairs(self, q: Tensor, k: Tensor) -> Tensor | None:
        """For q [B, N, Sq, D] and k [B, G, Sk, D]: bool, broadcastable to [B, N, Sq, Sk]; None: nothing is masked."""
        if self.mask is None:
            return None
        (batch, heads, num_queries), num_keys = q.shape[:3], k.shape[2]
        if self.sparse_mode in COMPRESSED:
            masked = self._from_mode(num_queries, num_keys)
        else:
            masked = self._from_mask(batch, heads, num_queries, num_keys)
        self._check_rows(masked, num_queries, num_keys)
        return masked

    def _from_mode(self, num_queries: int, num_keys: int) -> Tensor:
        query, key = torch.arange(num_queries)[:, None], torch.arange(num_keys)[None, :]
        if self.sparse_mode == TOP_LEFT_CAUSAL:
            return key > query
        last = query + (num_keys - num_queries)
        if self.sparse_mode == BOTTOM_RIGHT_CAUSAL:
            return key > last
        return (key > last + self.next_tokens) | (key < last - self.pre_tokens)

    def _from_mask(self, batch: int, heads: int, num_queries: int, num_keys: int) -> Tensor:
        assert self.mask is not None
        shape = tuple(self.mask.shape)
        if self.packed:
            # Packed, the mask covers the longest sequences, and each sequence uses its top left.
            fits = len(shape) == 2 and shape[0] >= num_queries and shape[1] >= num_keys
            require(fits, OP, "packed, atten_mask is [longest query, longest key]", f"shape {shape}")
            masked = self.mask.bool()[:num_queries, :num_keys]
        else:
            pair = (num_queries, num_keys)
            allowed = (pair, (1, 1, *pair), (batch, 1, *pair), (batch, heads, *pair))
            rule = f"atten_mask is [{num_queries}, {num_keys}], alone or after 1, 1, after B, 1 or after B, N"
            require(shape in allowed, OP, rule, f"shape {shape}")
            masked = self.mask.bool()
        if self.sparse_mode == ANY_MASK:
            self._check_band(masked, num_queries, num_keys)
        return masked

    def _check_band(self, masked: Tensor, num_queries: int, num_keys: int) -> None:
        """In mode 0 blocks outside the band are skipped, so that the mask must leave them out as well."""
        query, key = torch.arange(num_queries)[:, None], torch.arange(num_keys)[None, :]
        outside = (key > query + self.next_tokens) | (key < query - self.pre_tokens)
        require(
            bool(masked[..., outside].all()),
            OP,
            "in sparse_mode 0 the mask must agree with pre_tockens and next_tockens",
            f"a mask that keeps pairs outside pre_tockens={self.pre_tokens}, next_tockens={self.next_tokens}",
        )

    def _check_rows(self, masked: Tensor, num_queries: int, num_keys: int) -> None:
        if num_queries == 0 or not bool(masked.all(-1).any()):
            return
        require(not self.packed, OP, "TND forbids rows in which everything is masked", "such a row")
        # The operator can tell by itself in this one documented case.
        known = self.sparse_mode == BOTTOM_RIGHT_CAUSAL and num_queries > num_keys
        rule = f"rows in which everything is masked need inner_precise={WITH_MASKED_ROWS}"
        require(known or self.inner_precise == WITH_MASKED_ROWS, OP, rule, f"inner_precise={self.inner_precise}")


@functools.cache
def _compressed_mask() -> Tensor:
    return torch.ones(COMPRESSED_SIZE, COMPRESSED_SIZE, dtype=torch.bool).triu(1)
