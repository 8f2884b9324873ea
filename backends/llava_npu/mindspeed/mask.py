"""What may be asked of MindSpeed's attention, and the guard that holds callers to it.

MindSpeed 0.12.1 makes up for a missing mask: causal, unless `config.is_llava` is set, where it stays missing, which the
kernel takes for full attention. It also writes the sparse mode that fits its own mask into the config, where the next
call, which brings a mask, finds it. Behind the guard each call says what it wants, and leaves nothing behind.

Shapes: S positions, B rows, T packed tokens, N heads, H head dim.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from llava_npu.lowering import ALL_MASK, MAX_SEQUENCES, template

ABSENT = object()


@dataclass(frozen=True)
class Mode:
    """How MindSpeed's config says what a mask means: first to the local attention, then to Transformer Engine's."""

    sparse_mode: int
    attention_mask_type: str


OWN = Mode(ALL_MASK, "general")
"""The caller's mask is the whole truth, whatever `pre_tockens` and `next_tockens` say."""

PACKED_CAUSAL = Mode(2, "causal")
"""From the top left of each packed sample: of the modes for this, the only one that both attentions can be told."""

FULL = Mode(0, "no_mask")
"""Every query sees every key, as in an image tower. The only call without a mask."""


def choose_mode(has_mask: bool, packed: bool, call_type: str, layer_type: str) -> Mode:
    """What a call asks for.

    Args:
        has_mask, packed: whether it brings a mask, and sample boundaries.
        call_type, layer_type: the names of the call's and the layer's `AttnMaskType`.

    Raises:
        ValueError: it asks for nothing, or for two things at once.
    """
    asked = f"attention_mask {'given' if has_mask else 'None'}, packed_seq_params {'given' if packed else 'None'}, "
    asked += f"attn_mask_type {call_type} in a layer of type {layer_type}"
    if has_mask and not packed and call_type != "no_mask":
        return OWN
    if packed and not has_mask and call_type in ("causal", "padding_causal"):
        return PACKED_CAUSAL
    # MindSpeed looks at the layer's type alone before it makes up a mask.
    if not has_mask and not packed and call_type == layer_type == "no_mask":
        return FULL
    raise ValueError(
        f"MindSpeed's attention was called with {asked}. Pass the mask itself; or packed_seq_params with causal or "
        "padding_causal and no mask; or neither, with no_mask, for full attention. None never means causal here."
    )


def check_mask(mask: Tensor, num_queries: int, num_keys: int) -> None:
    """That the kernel takes a caller's mask whole: True (or 1) = **masked**, [S, S] or [B or 1, N or 1, S, S].

    Not looked at, for that would wait for the device: whether each query sees some key, which it must.

    Raises:
        ValueError: it is not.
    """
    if (
        mask.dtype not in (torch.bool, torch.uint8)
        or mask.dim() not in (2, 4)
        or mask.shape[-2:] != (num_queries, num_keys)
    ):
        raise ValueError(
            f"attention_mask is {mask.dtype} {tuple(mask.shape)}; expected bool or uint8, True where masked, in 2 or 4 "
            f"dims of which the last two are ({num_queries}, {num_keys})"
        )


def sample_ends(packed: Any, num_tokens: int) -> Tensor:
    """Where each packed sample ends, int64 on the host: what MindSpeed expects for the `cu_seqlens` of `packed`.

    Waits for the device if they are there, as MindSpeed itself does.

    Raises:
        ValueError: they are not megatron's 0, …, T, equal for queries and keys, or something else is asked as well.
    """
    # Copied whole: read one by one on the device, each bound would be a wait of its own.
    bounds = torch.as_tensor(packed.cu_seqlens_q).tolist()
    keys = bounds if packed.cu_seqlens_kv is packed.cu_seqlens_q else torch.as_tensor(packed.cu_seqlens_kv).tolist()
    if bounds != keys or bounds[0] != 0 or bounds[-1] != num_tokens or bounds != sorted(bounds):
        raise ValueError(
            f"packed_seq_params has cu_seqlens_q {bounds} and cu_seqlens_kv {keys}; expected both 0, …, {num_tokens}"
        )
    if packed.qkv_format != "thd" or packed.cu_seqlens_q_padded is not None or packed.cu_seqlens_kv_padded is not None:
        raise ValueError(
            f"packed_seq_params has qkv_format {packed.qkv_format!r} and may have padded boundaries; MindSpeed would "
            "ignore both: expected 'thd' without cu_seqlens_q_padded and cu_seqlens_kv_padded"
        )
    ends = [end for start, end in pairwise(bounds) if end > start]
    if len(ends) > MAX_SEQUENCES:
        raise ValueError(f"{len(ends)} packed samples; the kernel takes at most {MAX_SEQUENCES}")
    return torch.tensor(ends)


@contextmanager
def settings(config: object, mode: Mode) -> Iterator[None]:
    """`config` set to `mode`, and back to what it was, whatever happens."""
    before = {field.name: getattr(config, field.name, ABSENT) for field in dataclasses.fields(mode)}
    try:
        for name in before:
            setattr(config, name, getattr(mode, name))
        yield
    finally:
        for name, value in before.items():
            if value is ABSENT:
                delattr(config, name)
            else:
                setattr(config, name, value)


def guard(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """MindSpeed's attention forward, asked for exactly what the caller said."""

    @functools.wraps(forward)
    def guarded(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        if attention_bias is not None:
            raise ValueError("attention_bias is given, which MindSpeed's attention ignores or refuses; expected None")
        if getattr(self.config, "context_parallel_size", 1) > 1:
            raise ValueError(
                "context_parallel_size is above 1, where MindSpeed's masks were never verified; expected 1"
            )
        asked = attn_mask_type if attn_mask_type is not None else self.attn_mask_type
        mode = choose_mode(
            attention_mask is not None, packed_seq_params is not None, asked.name, self.attn_mask_type.name
        )
        if mode is OWN:
            assert attention_mask is not None
            check_mask(attention_mask, query.shape[0], key.shape[0])
        elif mode is PACKED_CAUSAL:
            ends = sample_ends(packed_seq_params, query.shape[0])
            packed_seq_params = dataclasses.replace(packed_seq_params, cu_seqlens_q=ends, cu_seqlens_kv=ends)
            attention_mask = template(query.device)
        with settings(self.config, mode):
            return forward(self, query, key, value, attention_mask, asked, None, packed_seq_params)

    return guarded
