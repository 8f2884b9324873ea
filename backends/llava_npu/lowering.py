"""A MaskSpec in the words of `npu_fusion_attention`. Imports no torch_npu, so that it can be tested on any machine.

|                     | MaskSpec                              | npu_fusion_attention                                   |
| ------------------- | ------------------------------------- | ------------------------------------------------------ |
| a mask tensor       | `key_valid` [B, Tk], True = **seen**  | `atten_mask` [B, 1, Tq, Tk], True = **masked**, mode 1 |
| no mask tensor      | says nothing: see the next rows       | **full attention**, whatever the other arguments say   |
| causal              | the last query sees the last key      | mode 3; mode 2 begins at the first query and key       |
| a window of w       | w keys, the query's own counted       | mode 4, `pre_tockens` = w − 1, `next_tockens` = 0      |
| packed samples      | `cu_seqlens_host`: 0, …, T            | layout TND, `actual_seq_qlen`: … T, without the 0      |
| a query without key | yields zeros                          | packed: forbidden; dense: documented nowhere           |

Modes 2 to 4 build the mask in the kernel, from one template of 2048 × 2048 for all lengths.

Source: torch_npu 2.13.0, `_op_plugin_docs.py`, and the page of npu_fusion_attention in Ascend/op-plugin (2026-08).
Shapes: B rows, Tq queries, Tk keys, N query heads, H head dim.
"""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from llava_core.backend import MaskSpec
from llava_core.backend.reference import attend_mask

ALL_MASK, BOTTOM_RIGHT_CAUSAL, BAND = 1, 3, 4
"""The sparse modes that are used here."""

WITH_MASKED_ROWS = 2
"""`inner_precise` for masks that may leave whole tiles of a row out; torch_npu's own SDPA passes it for each mask."""

TEMPLATE_SIZE = 2048
MAX_SEQUENCES = 1024
"""Packed samples in one call ("varlen: at most 1K")."""


def pattern(mask: MaskSpec, device: torch.device) -> dict[str, Any]:
    """The arguments for what the kernel can mask by itself: all of a mask but its padded keys."""
    if not mask.causal:
        return {}
    if mask.window is None:
        return {"atten_mask": template(device), "sparse_mode": BOTTOM_RIGHT_CAUSAL}
    band = {"pre_tockens": mask.window - 1, "next_tockens": 0}
    return {"atten_mask": template(device), "sparse_mode": BAND, **band}


def dense_arguments(
    mask: MaskSpec, num_queries: int, num_keys: int, device: torch.device
) -> tuple[dict[str, Any], Tensor | None]:
    """The arguments for dense rows, and which queries see nothing: [B, Tq, 1, 1] bool, None where all see something.

    What the kernel makes of a row in which everything is masked is documented nowhere, and a NaN in its result would
    reach the gradients of others as NaN · 0. So these rows see every key, and the caller has to zero their result.
    """
    assert mask.cu_seqlens is None, "packed samples are another layout"
    assert num_queries <= num_keys or not mask.causal, "the first queries would see nothing"
    if mask.key_valid is None:
        return pattern(mask, device), None
    allowed = attend_mask(mask, num_queries, num_keys, device)
    assert allowed is not None
    blind = ~allowed.any(-1, keepdim=True)
    masked = ~(allowed | blind)
    arguments = {"atten_mask": masked, "sparse_mode": ALL_MASK, "inner_precise": WITH_MASKED_ROWS}
    return arguments, blind.transpose(1, 2)


def sequence_groups(mask: MaskSpec) -> list[tuple[slice, list[int]]]:
    """Packed samples, as many as one call takes at a time: their tokens, and where each ends, counted from the first.

    Samples of no tokens are left out: where one comes first its end would be the 0 that the list must not begin with.
    """
    assert mask.cu_seqlens_host is not None
    bounds = [(start, end) for start, end in pairwise(mask.cu_seqlens_host) if end > start]
    groups = []
    for index in range(0, len(bounds), MAX_SEQUENCES):
        group = bounds[index : index + MAX_SEQUENCES]
        first, last = group[0][0], group[-1][1]
        groups.append((slice(first, last), [end - first for _, end in group]))
    return groups


@functools.cache
def template(device: torch.device) -> Tensor:
    """Modes 2 to 4's mask, True above the diagonal, on `device`.

    The cache cannot be stale: the mask depends on the device alone, and nothing writes to it.
    """
    # Not as an inference tensor, should the first call be made in inference: autograd could not save it later.
    with torch.inference_mode(False):
        return torch.ones(TEMPLATE_SIZE, TEMPLATE_SIZE, dtype=torch.bool, device=device).triu(1)
