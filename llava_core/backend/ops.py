"""The op catalogue: what the model may ask of hardware, and the cases on which any kernel is judged.

Shapes: B rows, T tokens, N query heads, G key/value heads, H head dim, D width, K supervised positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from llava_core.backend import reference
from llava_core.backend.kernels import KernelSpec, Selection, always
from llava_core.backend.masks import MaskSpec


@dataclass(frozen=True)
class Case:
    """Sample inputs of an op.

    Attributes:
        name: unique within the op.
        make: float64 arguments from a seeded generator; cast the floating ones to the dtype under test.
        differentiable: positions of the arguments that get a gradient.
        describe: what a kernel is asked to support for this case, beside dtype and gradient.
    """

    name: str
    make: Callable[[torch.Generator], tuple[Any, ...]]
    differentiable: tuple[int, ...]
    describe: Mapping[str, Any]


@dataclass(frozen=True)
class Op:
    """One op: its reference and how a kernel's error is judged.

    Attributes:
        error_multiple: a kernel's largest error against float64 may be this multiple of the reference's own in the
            same dtype. Two roundings instead of one, in another order, stay below it.
    """

    name: str
    reference: Callable[..., Any]
    cases: tuple[Case, ...]
    error_multiple: float


@dataclass(frozen=True)
class OpSet:
    """The functions a model runs on, one for each place that asks. Signatures are the references'."""

    vision_attention: Callable[..., Tensor]
    attention: Callable[..., Tensor]
    rms_norm: Callable[..., Tensor]
    rotary: Callable[..., tuple[Tensor, Tensor]]
    swiglu: Callable[..., Tensor]
    linear_cross_entropy: Callable[..., Tensor]

    @classmethod
    def of(cls, selections: Mapping[str, Selection]) -> OpSet:
        """The functions that were selected; a site that the model does not have keeps the reference."""
        return cls(**{f.name: _function(selections, f.name) for f in fields(cls)})


SITES: Mapping[str, str] = {
    "vision_attention": "attention",
    "attention": "attention",
    "rms_norm": "rms_norm",
    "rotary": "rotary",
    "swiglu": "swiglu",
    "linear_cross_entropy": "linear_cross_entropy",
}
"""Which op each field of `OpSet` is."""


def _function(selections: Mapping[str, Selection], site: str) -> Callable[..., Any]:
    selection = selections.get(site)
    return selection.function if selection is not None else CATALOGUE[SITES[site]].reference


def reference_kernels() -> list[KernelSpec]:
    """Every op's reference as the kernel of last resort."""
    address = "llava_core.backend.reference:{}"
    return [KernelSpec(name, "reference", address.format(name), 0, always) for name in CATALOGUE]


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _offsets(lengths: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
    host = [0]
    for length in lengths:
        host.append(host[-1] + length)
    return torch.tensor(host, dtype=torch.int32), tuple(host)


def _attention_case(
    name: str,
    *,
    queries: int,
    keys: int,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 32,
    rows: int = 2,
    causal: bool = True,
    window: int | None = None,
    lengths: Sequence[int] | None = None,
    padded: tuple[int, ...] | None = None,
) -> Case:
    """`lengths` packs samples into one row; `padded` masks that many leading keys of each row."""
    valid = None if padded is None else torch.arange(keys)[None, :] >= torch.tensor(padded)[:, None]
    if lengths is not None:
        device_offsets, host_offsets = _offsets(lengths)
        mask = MaskSpec.packed(device_offsets, host_offsets, causal=causal, window=window)
        rows, queries, keys = 1, sum(lengths), sum(lengths)
    else:
        mask = MaskSpec.dense(causal=causal, window=window, key_valid=valid)

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        q = _randn(generator, rows, queries, heads[0], head_dim)
        k = _randn(generator, rows, keys, heads[1], head_dim)
        v = _randn(generator, rows, keys, heads[1], head_dim)
        return q, k, v, mask, head_dim**-0.5

    describe = {
        "head_dim": head_dim,
        "num_heads": heads[0],
        "num_kv_heads": heads[1],
        "masks": (mask.facts(unequal_lengths=queries != keys),),
        "max_length": max(lengths) if lengths else keys,
    }
    return Case(name, make, (0, 1, 2), describe)


def _simple(name: str, differentiable: tuple[int, ...], make: Callable[[torch.Generator], tuple[Any, ...]]) -> Case:
    return Case(name, make, differentiable, {})


def _cross_entropy_inputs(generator: torch.Generator, num_labels: int) -> tuple[Any, ...]:
    hidden, weight = _randn(generator, num_labels, 48), _randn(generator, 211, 48) * 48**-0.5
    targets = torch.randint(0, 211, (num_labels,), generator=generator)
    weights = torch.rand(num_labels, generator=generator, dtype=torch.float32) / max(num_labels, 1)
    return hidden, weight, targets, weights


ATTENTION_CASES = (
    _attention_case("full", queries=50, keys=50, heads=(4, 4), causal=False),
    _attention_case("causal", queries=33, keys=33),
    _attention_case("causal_long", queries=300, keys=300, rows=1),
    _attention_case("causal_window", queries=40, keys=40, window=7),
    _attention_case("decode", queries=1, keys=29),
    _attention_case("decode_padded", queries=1, keys=29, rows=3, padded=(0, 5, 28)),
    _attention_case("decode_window_padded", queries=1, keys=29, window=8, padded=(0, 20)),
    _attention_case("prefill_padded", queries=9, keys=9, padded=(0, 4)),  # the first queries of row 1 see nothing
    _attention_case("bottom_right", queries=6, keys=29),
    _attention_case("packed_causal", queries=0, keys=0, lengths=(17, 1, 40, 9)),
    _attention_case("packed_uniform", queries=0, keys=0, lengths=(24, 24, 24)),
    _attention_case("packed_window", queries=0, keys=0, lengths=(30, 12), window=5),
    _attention_case("packed_long", queries=0, keys=0, lengths=(280, 20)),
    _attention_case("head_dim_64", queries=20, keys=20, heads=(8, 8), head_dim=64),
)

CATALOGUE: Mapping[str, Op] = {
    op.name: op
    for op in (
        Op("attention", reference.attention, ATTENTION_CASES, error_multiple=3.0),
        Op(
            "rms_norm",
            reference.rms_norm,
            (_simple("rows", (0, 1), lambda g: (_randn(g, 3, 7, 64), 1 + 0.1 * _randn(g, 64), 1e-5)),),
            error_multiple=3.0,
        ),
        Op(
            "rotary",
            reference.rotary,
            (
                _simple(
                    "grouped",
                    (0, 1),
                    lambda g: (
                        _randn(g, 2, 9, 4, 32),
                        _randn(g, 2, 9, 2, 32),
                        *(f(_randn(g, 2, 9, 16)).repeat(1, 1, 2) for f in (torch.cos, torch.sin)),
                    ),
                ),
            ),
            error_multiple=3.0,
        ),
        Op(
            "swiglu",
            reference.swiglu,
            (_simple("rows", (0, 1), lambda g: (_randn(g, 5, 96), _randn(g, 5, 96))),),
            error_multiple=3.0,
        ),
        Op(
            "linear_cross_entropy",
            reference.linear_cross_entropy,
            (
                _simple("labels", (0, 1), lambda g: _cross_entropy_inputs(g, 37)),
                _simple("no_labels", (0, 1), lambda g: _cross_entropy_inputs(g, 0)),
            ),
            error_multiple=3.0,
        ),
    )
}
