"""Honour or refuse: a kernel says No with a reason, or does what every argument asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llava_core.backend import CATALOGUE, KernelSpec, MaskFacts, MaskSpec, No, OpRequest, Yes
from llava_core.backend import reference as ops
from llava_core.testing.conformance.check import Check, CheckFailed
from llava_core.testing.conformance.masks import packed
from llava_core.testing.conformance.subject import EITHER, Subject, build_request, determinism, target
from llava_core.testing.kernels import to_device

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32
KEYS = 12


@dataclass(frozen=True)
class Argument:
    """One argument of an op and what a kernel that ignores it would answer.

    Attributes:
        make: the op's arguments, in float64.
        ignored: the op's exact answer for the same arguments, had this one not been given.
        describe: see `Case.describe`.
    """

    op: str
    name: str
    make: Callable[[torch.Generator], tuple[Any, ...]]
    ignored: Callable[..., Any]
    describe: Mapping[str, Any] = field(default_factory=dict)


def checks(subject: Subject) -> Iterator[Check]:
    """What each kernel answers to requests, and whether it then honours each argument."""
    reasons = "every request is answered by Yes or by No with a reason, and nothing raises"
    for kernel in subject.kernels:
        yield Check("refusal.reasons", target(kernel), reasons, partial(_check_reasons, subject, kernel), kernel.op)
    honoured = "a kernel that accepts this argument does not ignore it"
    for kernel, dtype in subject.kernel_dtypes():
        for argument in ARGUMENTS:
            if argument.op == kernel.op:
                run = partial(_check_honoured, subject, kernel, dtype, argument)
                yield Check("refusal.honoured", target(kernel, argument.name, dtype), honoured, run, kernel.op)


def requests(kernel: KernelSpec) -> Iterator[OpRequest]:
    """Usual and unusual requests: from a plain one, one or two facts changed at a time."""
    attention = kernel.op == "attention"
    sizes: dict[str, Any] = {"head_dim": 64, "num_heads": 8, "num_kv_heads": 2, "max_length": 2048}
    plain = build_request(kernel, torch.bfloat16, sizes | {"masks": (MaskFacts(True, True),)} if attention else {})
    changes: list[dict[str, Any]] = [{"needs_grad": False}, {"deterministic": False}, {"deterministic": True}]
    if attention:
        changes += [{"head_dim": d} for d in (None, 1, 7, 72, 80, 256, 1000)]
        changes += [{"max_length": n} for n in (None, 1, 1 << 20)] + [{"num_heads": 1, "num_kv_heads": 1}]
        changes += [{"masks": masks} for masks in _mask_requests()]
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8):
        yield from (replace(plain, dtype=dtype, **change) for change in [{}, *changes])


def _mask_requests() -> Iterator[tuple[MaskFacts, ...]]:
    yield ()
    for causal in (True, False):
        yield (MaskFacts(packed=True, causal=causal),)
        for padding in (True, False):
            yield from ((MaskFacts(False, causal, None, padding, unequal),) for unequal in (True, False))
    windowed = [MaskFacts(packed, True, 128, not packed, not packed) for packed in (True, False)]
    yield from ((facts,) for facts in windowed)
    yield tuple(windowed)


def _check_reasons(subject: Subject, kernel: KernelSpec) -> str:
    accepted = refused = 0
    for request in requests(kernel):
        verdict = kernel.verdict(request)
        if isinstance(verdict, No):
            if not (isinstance(verdict.reason, str) and verdict.reason.strip()):
                raise CheckFailed(f"No without a reason to {request}")
            refused += 1
        elif isinstance(verdict, Yes):
            accepted += 1
        else:
            raise CheckFailed(f"neither Yes nor No but {verdict!r} to {request}")
    return f"{accepted} accepted, {refused} refused"


def _check_honoured(subject: Subject, kernel: KernelSpec, dtype: torch.dtype, argument: Argument) -> str:
    function = subject.require(kernel, dtype, argument.describe, EITHER)
    inputs = [_rounded(x, dtype) for x in argument.make(torch.Generator().manual_seed(3))]
    wide = [_rounded(x, torch.float64) for x in inputs]
    exact, ignored = _first(CATALOGUE[argument.op].reference(*wide)), _first(argument.ignored(*wide))
    with determinism(kernel.deterministic):
        found = _first(function(*(to_device(x, subject.device) for x in inputs))).to("cpu", torch.float64)
    if found.shape != exact.shape:
        raise CheckFailed(f"the result has shape {tuple(found.shape)}, not {tuple(exact.shape)}")
    effect = float((exact - ignored).abs().max())
    error, likeness = float((found - exact).abs().max()), float((found - ignored).abs().max())
    # Each argument here moves the result by much more than any dtype rounds: half of the way is no rounding error.
    if not error < effect / 2:
        seems = "as if it were not given" if likeness < effect / 2 else "neither as asked nor as if it were not given"
        raise CheckFailed(
            f"accepted, but the result is {seems}: off by {error:.3g} where {argument.name} moves it by {effect:.3g}"
        )
    return ""


def _first(result: Any) -> Tensor:
    first: Tensor = torch.cat([x.flatten() for x in result]) if isinstance(result, tuple) else result
    return first


def _rounded(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _attention(name: str, mask: MaskSpec, without: MaskSpec, *, scale: float = 0.5, rows: int = 1) -> Argument:
    def make(generator: torch.Generator) -> tuple[Any, ...]:
        q, k, v = (
            torch.randn(rows, KEYS, heads, HEAD_DIM, generator=generator, dtype=torch.float64)
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        return q, k, v, mask, scale

    def ignored(q: Tensor, k: Tensor, v: Tensor, _: MaskSpec, given: float) -> Tensor:
        # Where the scale is what is ignored, what libraries take instead is 1/√H.
        return ops.attention(q, k, v, without, HEAD_DIM**-0.5 if name == "scale" else given)

    return Argument("attention", name, make, ignored, _describe(mask.facts()))


def _describe(facts: MaskFacts) -> dict[str, Any]:
    return {
        "head_dim": HEAD_DIM,
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "masks": (facts,),
        "max_length": KEYS,
    }


def _unequal_lengths() -> Argument:
    """Ignored, the causal mask is aligned at the first query and key."""
    mask, queries = MaskSpec.dense(causal=True), 5

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        q, k, v, _, scale = _attention("", mask, mask).make(generator)
        return q[:, :queries], k, v, mask, scale

    def ignored(q: Tensor, k: Tensor, v: Tensor, given: MaskSpec, scale: float) -> Tensor:
        return ops.attention(q, k[:, :queries], v[:, :queries], given, scale)

    return Argument("attention", "unequal_lengths", make, ignored, _describe(mask.facts(unequal_lengths=True)))


def _draw(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _norm_arguments(generator: torch.Generator, eps: float) -> tuple[Any, ...]:
    return _draw(generator, 6, 64), 2 + 0.1 * _draw(generator, 64), eps


def _rotary_arguments(generator: torch.Generator) -> tuple[Any, ...]:
    angles = _draw(generator, 1, 9, 16).repeat(1, 1, 2)
    return _draw(generator, 1, 9, 4, 32), _draw(generator, 1, 9, 2, 32), angles.cos(), angles.sin()


def _loss_arguments(generator: torch.Generator) -> tuple[Any, ...]:
    targets = torch.randint(0, 50, (8,), generator=generator)
    weights = torch.tensor([0, 3, 0, 0, 1, 0, 0, 0], dtype=torch.float32)
    return _draw(generator, 8, 32), _draw(generator, 50, 32), targets, weights


_CAUSAL = MaskSpec.dense(causal=True)
_FULL = MaskSpec.dense(causal=False)
_VALID = torch.arange(KEYS)[None, :] >= torch.tensor([0, 7])[:, None]

ARGUMENTS = (
    _attention("causal", _CAUSAL, _FULL),
    _attention("window", MaskSpec.dense(causal=True, window=2), _CAUSAL),
    _attention("key_padding", MaskSpec.dense(causal=False, key_valid=_VALID), _FULL, rows=2),
    _attention("key_padding_causal", MaskSpec.dense(causal=True, key_valid=_VALID), _CAUSAL, rows=2),
    _attention("cu_seqlens", packed((4, 8)), _CAUSAL),
    _attention("packed_window", packed((4, 8), window=2), packed((4, 8))),
    _attention("scale", _CAUSAL, _CAUSAL),
    _unequal_lengths(),
    Argument(
        "rms_norm",
        "weight",
        partial(_norm_arguments, eps=1e-5),
        lambda x, w, eps: ops.rms_norm(x, torch.ones_like(w), eps),
    ),
    Argument("rms_norm", "eps", partial(_norm_arguments, eps=1.0), lambda x, w, eps: ops.rms_norm(x, w, 1e-6)),
    Argument("rotary", "cos", _rotary_arguments, lambda q, k, c, s: ops.rotary(q, k, torch.ones_like(c), s)),
    Argument("rotary", "sin", _rotary_arguments, lambda q, k, c, s: ops.rotary(q, k, c, torch.zeros_like(s))),
    Argument(
        "swiglu",
        "order",
        lambda g: (_draw(g, 5, 96), 3 * _draw(g, 5, 96)),
        lambda gate, up: ops.swiglu(up, gate),
    ),
    Argument(
        "linear_cross_entropy",
        "weights",
        _loss_arguments,
        lambda h, w, t, weights: ops.linear_cross_entropy(h, w, t, torch.ones_like(weights)),
    ),
    Argument(
        "linear_cross_entropy",
        "targets",
        _loss_arguments,
        lambda h, w, t, weights: ops.linear_cross_entropy(h, w, torch.zeros_like(t), weights),
    ),
)
