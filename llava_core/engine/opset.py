"""Asks a backend for the functions that a model will run on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llava_core.backend import Backend, MaskFacts, OpRequest, OpSet, Selection, reference_kernels, select_all
from llava_core.backend.ops import SITES
from llava_core.model.spec import ModelSpec, TextSpec


@dataclass(frozen=True)
class Use:
    """How a model will be used, as far as kernels must know.

    Attributes:
        trainable: the parts that learn; empty for inference, which also decodes with a cache.
        max_length: tokens of the longest sequence.
        tensor: processes that share the decoder's heads.
        context: processes that share each sequence.
    """

    dtype: torch.dtype
    trainable: frozenset[str]
    max_length: int
    deterministic: bool
    tensor: int = 1
    context: int = 1


def build_ops(
    spec: ModelSpec, backend: Backend, use: Use, pins: Mapping[str, str] | None = None
) -> tuple[OpSet, dict[str, Selection]]:
    """The functions that `backend` serves this model with, and why each was chosen.

    Raises:
        KernelUnavailable: a pinned kernel cannot run, or none can.
    """
    kernels = [*backend.kernels(), *reference_kernels()]
    selections = select_all(kernels, requests(spec, use), pins or {})
    return OpSet.of(selections), selections


def requests(spec: ModelSpec, use: Use) -> list[OpRequest]:
    """What each place in the model asks for."""
    facts: dict[str, dict[str, Any]] = {site: {} for site in SITES}
    facts["attention"] = {
        "head_dim": spec.text.head_dim,
        "num_heads": spec.text.num_heads // use.tensor,
        "num_kv_heads": spec.text.num_kv_heads // use.tensor,
        "masks": _decoder_masks(spec.text, use),
        "max_length": use.max_length,
    }
    if spec.vision is None:
        del facts["vision_attention"]
    else:
        facts["vision_attention"] = {
            "head_dim": spec.vision.head_dim,
            "num_heads": spec.vision.num_heads,
            "num_kv_heads": spec.vision.num_heads,
            "masks": (MaskFacts(packed=False, causal=False),),
            "max_length": spec.vision.num_positions,
        }
    return [
        OpRequest(SITES[site], site, use.dtype, _needs_grad(site, use), use.deterministic, **described)
        for site, described in facts.items()
    ]


def _needs_grad(site: str, use: Use) -> bool:
    # Gradients pass through the whole decoder even where only the projector, below it, learns.
    return "vision" in use.trainable if site == "vision_attention" else bool(use.trainable)


def _decoder_masks(spec: TextSpec, use: Use) -> tuple[MaskFacts, ...]:
    if use.context > 1:  # a process has some of a sample's queries, and all keys before them
        return (MaskFacts(packed=False, causal=True, window=spec.sliding_window, unequal_lengths=True),)
    packed = MaskFacts(packed=True, causal=True, window=spec.sliding_window)
    cached = MaskFacts(packed=False, causal=True, window=spec.sliding_window, key_padding=True, unequal_lengths=True)
    return (packed,) if use.trainable else (packed, cached)
