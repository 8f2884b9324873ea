"""A MaskSpec in the words of the flash-attention family. Plain functions, so that they can be tested on any machine."""

from __future__ import annotations

from llava_core.backend import MaskSpec

FULL = (-1, -1)
"""`window_size` of attention without a window."""


def window_size(mask: MaskSpec) -> tuple[int, int]:
    """(left, right): how many keys before and after its own position a query sees, −1 for all.

    The family counts the query's own key apart, MaskSpec counts it in: a window of w is (w − 1, 0). Both align the
    last query with the last key.
    """
    if not mask.causal:
        return FULL
    return (-1 if mask.window is None else mask.window - 1, 0)


def max_length(mask: MaskSpec) -> int:
    """The longest packed sample."""
    return max(mask.lengths)


def needs_lowering(mask: MaskSpec, num_queries: int, num_keys: int) -> bool:
    """Whether a dense call has what SDPA would need a mask tensor for, and this family has an argument for."""
    if mask.key_valid is not None:
        return False  # single keys can only be masked out by a tensor
    return mask.window is not None or (mask.causal and num_queries != num_keys)
