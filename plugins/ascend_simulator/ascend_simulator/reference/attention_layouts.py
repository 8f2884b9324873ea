"""The layouts of `npu_fusion_attention`, as blocks [B, N, S, D] that each attend within themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from ascend_simulator.contract import HALF_AND_FLOAT, require, require_dtype

OP = "npu_fusion_attention"
NUM_DIMS = {"BSH": 3, "SBH": 3, "BSND": 4, "BNSD": 4, "TND": 3}
MAX_HEAD_DIM, MAX_HEADS, MAX_LENGTH = 768, 256, 1 << 20
MAX_SEQUENCES = 1024


@dataclass(frozen=True)
class Layout:
    """How one call's tensors lie in memory.

    Attributes:
        query_ends, key_ends: for TND, where each sequence ends.
    """

    name: str
    heads: int
    key_heads: int
    query_ends: tuple[int, ...] = ()
    key_ends: tuple[int, ...] = ()

    @property
    def packed(self) -> bool:
        """Whether sequences lie end to end."""
        return self.name == "TND"

    def blocks(self, queries: Sequence[Tensor], keys: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        """Views [B, N, S, D] of tensors laid out as the query and of others laid out as the key, block by block."""
        if not self.packed:
            yield tuple(self._bnsd(x, self.heads) for x in queries) + tuple(self._bnsd(x, self.key_heads) for x in keys)
            return
        for (start, end), (key_start, key_end) in zip(
            pairwise((0, *self.query_ends)), pairwise((0, *self.key_ends)), strict=True
        ):
            own = [x[start:end] for x in queries] + [x[key_start:key_end] for x in keys]
            yield tuple(x.transpose(0, 1).unsqueeze(0) for x in own)

    def _bnsd(self, x: Tensor, heads: int) -> Tensor:
        if self.name == "BSH":
            return x.unflatten(-1, (heads, -1)).transpose(1, 2)
        if self.name == "SBH":
            return x.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
        return x.transpose(1, 2) if self.name == "BSND" else x


def read_layout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    name: str,
    query_ends: Sequence[int] | None,
    key_ends: Sequence[int] | None,
) -> Layout:
    """Checks the shapes and dtypes of a call and says how it is laid out."""
    require(name in NUM_DIMS, OP, f"input_layout is one of {', '.join(NUM_DIMS)}", repr(name))
    for part, tensor in (("query", query), ("key", key), ("value", value)):
        require_dtype(OP, part, tensor, HALF_AND_FLOAT)
        require(tensor.dtype == query.dtype, OP, "query, key and value have one dtype", f"{part} {tensor.dtype}")
        require(
            tensor.dim() == NUM_DIMS[name], OP, f"{name} has {NUM_DIMS[name]} dims", f"{part} {tuple(tensor.shape)}"
        )
    require(1 <= heads <= MAX_HEADS, OP, f"head_num is from 1 to {MAX_HEADS}", heads)
    key_heads = _count_key_heads(query, key, heads, name)
    rule = "query's heads are a multiple of key's"
    require(key_heads > 0 and heads % key_heads == 0, OP, rule, f"{heads} and {key_heads}")
    layout = Layout(name, heads, key_heads)
    if layout.packed:
        ends = _read_ends("actual_seq_qlen", query_ends, query), _read_ends("actual_seq_kvlen", key_ends, key)
        require(len(ends[0]) == len(ends[1]), OP, "as many query as key sequences", f"{len(ends[0])}, {len(ends[1])}")
        layout = Layout(name, heads, key_heads, *ends)
    _check_shapes(layout, query, key, value)
    return layout


def _count_key_heads(query: Tensor, key: Tensor, heads: int, name: str) -> int:
    if name in ("BSH", "SBH"):
        require(query.shape[-1] % heads == 0, OP, "H is head_num · D", f"{query.shape[-1]} for {heads} heads")
        return key.shape[-1] // (query.shape[-1] // heads)
    axis = name.index("N")
    require(query.shape[axis] == heads, OP, "query has head_num heads", f"{query.shape[axis]}, not {heads}")
    return key.shape[axis]


def _read_ends(argument: str, ends: Sequence[int] | None, tensor: Tensor) -> tuple[int, ...]:
    require(ends is not None and len(ends) > 0, OP, f"TND needs {argument}", ends)
    assert ends is not None
    require(len(ends) <= MAX_SEQUENCES, OP, f"{argument} has at most {MAX_SEQUENCES} entries", len(ends))
    require(ends[0] != 0, OP, f"{argument} starts with the first sequence's end, not with 0", list(ends[:3]))
    ascending = all(first <= second for first, second in pairwise(ends))
    require(ascending, OP, f"{argument} is cumulative", list(ends[:8]))
    require(ends[-1] == tensor.shape[0], OP, f"{argument} ends with T = {tensor.shape[0]}", ends[-1])
    return tuple(ends)


def _check_shapes(layout: Layout, query: Tensor, key: Tensor, value: Tensor) -> None:
    dense = Layout("TND" if layout.packed else layout.name, layout.heads, layout.key_heads, (len(query),), (len(key),))
    q, k, v = next(dense.blocks([query], [key, value]))
    found = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    require(q.shape[0] == k.shape[0] == v.shape[0], OP, "query, key and value have one B", found)
    require(k.shape[1:3] == v.shape[1:3], OP, "key and value have the same heads and length", found)
    require(q.shape[-1] == k.shape[-1] >= v.shape[-1], OP, "Dq = Dk ≥ Dv", found)
    require(v.shape[-1] >= 1 and q.shape[-1] <= MAX_HEAD_DIM, OP, f"D is from 1 to {MAX_HEAD_DIM}", found)
    lengths = q.shape[2], k.shape[2]
    require(min(lengths) >= 1 and max(lengths) <= MAX_LENGTH, OP, f"S is from 1 to {MAX_LENGTH}", found)
