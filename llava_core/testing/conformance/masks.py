"""Sentinels of attention's masks: where hardware libraries differ most, and a wrong answer still looks plausible.

What each query must see is written out here by hand, apart from the reference's own mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise, permutations
from typing import TypeAlias

import torch
from torch import Tensor

from llava_core.backend import KernelSpec, MaskSpec
from llava_core.testing.conformance.check import Check, CheckFailed, CheckSkipped
from llava_core.testing.conformance.subject import Subject, target
from llava_core.testing.conformance.visibility import (
    NUM_HEADS,
    Attention,
    expect_visible,
    serve,
)

KEYS = 21
WINDOW = 4
LENGTHS = (5, 1, 9, 6)
MaskCheck: TypeAlias = Callable[[Subject, KernelSpec, torch.dtype], str]


def checks(subject: Subject) -> Iterator[Check]:
    """Each sentinel on each attention kernel and dtype."""
    for kernel, dtype in subject.kernel_dtypes("attention"):
        for name, (explanation, run) in CHECKS.items():
            yield Check(name, target(kernel, dtype), explanation, partial(run, subject, kernel, dtype), "attention")


def packed(lengths: Sequence[int], *, window: int | None = None) -> MaskSpec:
    """A causal mask of samples end to end."""
    host = (0, *accumulate(lengths))
    return MaskSpec.packed(torch.tensor(host, dtype=torch.int32), host, causal=True, window=window)


def visible(num_queries: int, num_keys: int, rule: Callable[[int, int], bool]) -> Tensor:
    """[Tq, Tk], pair by pair."""
    return torch.tensor([[rule(q, k) for k in range(num_keys)] for q in range(num_queries)])


def visible_packed(lengths: Sequence[int], window: int | None = None) -> Tensor:
    """A block for each sample, a causal triangle inside it."""
    offsets = (0, *accumulate(lengths))
    out = torch.zeros(offsets[-1], offsets[-1], dtype=torch.bool)
    for start, end in pairwise(offsets):
        for q in range(start, end):
            first = start if window is None else max(start, q - window + 1)
            out[q, first : q + 1] = True
    return out


def _check_causal(subject: Subject, kernel: KernelSpec, dtype: torch.dtype) -> str:
    mask = MaskSpec.dense(causal=True)
    weights = serve(subject, kernel, dtype, [mask], keys=KEYS).weights(mask, KEYS, KEYS, rows=2)
    expect_visible(weights, visible(KEYS, KEYS, lambda q, k: k <= q))
    return ""


def _check_full(subject: Subject, kernel: KernelSpec, dtype: torch.dtype) -> str:
    mask = MaskSpec.dense(causal=False)
    weights = serve(subject, kernel, dtype, [mask], keys=KEYS).weights(mask, KEYS, KEYS, rows=2)
    expect_visible(weights, torch.ones(KEYS, KEYS, dtype=torch.bool))
    return ""


def _check_alignment(subject: Subject, kernel: KernelSpec, dtype: torch.dtype) -> str:
    mask = MaskSpec.dense(causal=True)
    attention = serve(subject, kernel, dtype, [mask], keys=KEYS, unequal_lengths=True)
    for queries in (1, 6):
        weights = attention.weights(mask, queries, KEYS)
        expect_visible(weights, visible(queries, KEYS, lambda q, k, behind=KEYS - queries: k <= q + behind))  # type: ignore[misc]
    return ""


def _check_window(subject: Subject, kernel: KernelSpec, dtype: torch.dtype) -> str:
    mask = MaskSpec.dense(causal=True, window=WINDOW)
    weights = serve(subject, kernel, dtype, [mask], keys=KEYS).weights(mask, KEYS, KEYS)
    expect_visible(weights, visible(KEYS, KEYS, lambda q, k: q - WINDOW < k <= q))
    return ""


def _check_packed(subject: Subject, kernel: KernelSpec, dtype: torch.dtype) -> str:
    mask = packed(LENGTHS)
    weights = serve(subject, kernel, dtype, [mask], keys=max(LENGTHS)).weights(mask, KEYS, KEYS)
    expect_visible(weights, visible_packed(LENGTHS))
    return ""


def _check_packed_window(subject: Subject, kernel: KernelSpec, dtype: torch.dtype) -> str:
    mask = packed(LENGTHS, window=WINDOW)
    weights = serve(subject, kernel, dtype, [mask], keys=max(LENGTHS)).weights(mask, KEYS, KEYS)
    expect_visible(weights, visible_packed(LENGTHS, WINDOW))
    return ""


def _padded(*leading: int) -> MaskSpec:
    """Rows of which so many leading keys are padding."""
    valid = torch.arange(KEYS)[None, :] >= torch.tensor(leading)[:, None]
    return MaskSpec.dense(causal=True, key_valid=valid)


def _check_padding(subject: Subject, kernel: KernelSpec, dtype: torch.dtype) -> str:
    mask = _padded(0, 5, 20)
    weights = serve(subject, kernel, dtype, [mask], keys=KEYS, unequal_lengths=True).weights(mask, 1, KEYS, rows=3)
    expect_visible(weights, mask.key_valid[:, None, :] if mask.key_valid is not None else torch.empty(0))
    return ""


def _check_empty_rows(subject: Subject, kernel: KernelSpec, dtype: torch.dtype) -> str:
    """Left-padded prefill: the padding's own queries see nothing."""
    mask = _padded(0, 6)
    attention = serve(subject, kernel, dtype, [mask], keys=KEYS, gradients=(True,))
    q, k, v = _random(attention, rows=2)
    inputs = [x.to(subject.device, dtype).requires_grad_() for x in (q, k, v)]
    out = attention(inputs[0], inputs[1], inputs[2], mask)
    if bool((out[1, :6] != 0).any()):
        raise CheckFailed(f"a query that sees no key gives {float(out[1, :6].abs().max()):.3g}, not zero")
    grads = torch.autograd.grad(out.float().square().sum(), inputs)
    for name, grad in zip("qkv", grads, strict=True):
        if not bool(grad.isfinite().all()):
            raise CheckFailed(f"where a query sees no key, the gradient of {name} is not finite")
    if bool((grads[0][1, :6] != 0).any()) or any(bool((g[1, :6] != 0).any()) for g in grads[1:]):
        raise CheckFailed("padding gets a gradient")
    return ""


def _check_isolation(subject: Subject, kernel: KernelSpec, dtype: torch.dtype) -> str:
    """Sample by sample: new content in one leaves every other sample's outputs and gradients as they were."""
    mask = packed(LENGTHS)
    attention = serve(subject, kernel, dtype, [mask], keys=max(LENGTHS), gradients=(True,))
    before = _with_gradients(attention, _random(attention), mask)
    offsets = (0, *accumulate(LENGTHS))
    for changed, (start, end) in enumerate(pairwise(offsets)):
        inputs = _random(attention)
        for x in inputs:
            x[:, start:end] = 8.0 - x[:, start:end]  # large, but scores of it still fit fp16
        after = _with_gradients(attention, inputs, mask)
        for part, expected in before.items():
            same = (after[part] == expected).flatten(2).all(-1)[0]
            same[start:end] = True
            if not bool(same.all()):
                where = int((~same).nonzero()[0])
                other = sum(where >= offset for offset in offsets) - 1
                raise CheckFailed(f"a change in sample {changed} changes {part} of sample {other} (token {where})")
    return ""


def _check_fresh(subject: Subject, kernel: KernelSpec, dtype: torch.dtype) -> str:
    """Masks of equal shape in alternation, new tensors and rewritten ones: what a cache with a weak key mixes up."""
    plans = ((7, 7, 7), (3, 9, 9), (7, 7, 7), (9, 9, 3), (1, 19, 1))
    attention = serve(subject, kernel, dtype, [packed(p) for p in plans], keys=max(max(p) for p in plans))
    buffer = torch.zeros(4, dtype=torch.int32, device=subject.device)
    for rewritten in (False, True):
        for number, lengths in enumerate(plans):
            mask = packed(lengths)
            if rewritten and mask.cu_seqlens is not None:  # a loader may fill one buffer again and again
                buffer.copy_(mask.cu_seqlens)
                mask = MaskSpec.packed(buffer, mask.cu_seqlens_host or (), causal=True)
            try:
                expect_visible(attention.weights(mask, KEYS, KEYS), visible_packed(lengths))
            except CheckFailed as failure:
                how = "in a rewritten tensor" if rewritten else "in new tensors"
                raise CheckFailed(f"call {number + 1} of packed samples of equal number, {how}: {failure}") from failure
    return ""


def _check_switching(subject: Subject, kernel: KernelSpec, dtype: torch.dtype) -> str:
    """Kinds of mask in turn over inputs of one shape: a mode that a call leaves behind answers for the next one."""
    kinds: dict[str, tuple[MaskSpec, Tensor]] = {
        "full": (MaskSpec.dense(causal=False), torch.ones(KEYS, KEYS, dtype=torch.bool)),
        "causal": (MaskSpec.dense(causal=True), visible(KEYS, KEYS, lambda q, k: k <= q)),
        "window": (MaskSpec.dense(causal=True, window=WINDOW), visible(KEYS, KEYS, lambda q, k: q - WINDOW < k <= q)),
        "padded": (_padded(5), visible(KEYS, KEYS, lambda q, k: 5 <= k <= q)),
        "packed": (packed(LENGTHS), visible_packed(LENGTHS)),
    }
    served = {}
    for kind, (mask, _) in kinds.items():
        try:
            served[kind] = serve(subject, kernel, dtype, [mask], keys=KEYS)
        except CheckSkipped as reason:
            refused = str(reason)
    if len(served) < 2:
        raise CheckSkipped(f"it serves {', '.join(served)} masks alone; {refused}" if served else refused)
    for before, after in permutations(served, 2):
        served[before].weights(kinds[before][0], KEYS, KEYS)
        mask, expected = kinds[after]
        try:
            expect_visible(served[after].weights(mask, KEYS, KEYS), expected)
        except CheckFailed as failure:
            raise CheckFailed(f"a {after} mask after a {before} one: {failure}") from failure
    return ", ".join(served)


def _check_fresh_padding(subject: Subject, kernel: KernelSpec, dtype: torch.dtype) -> str:
    masks = [_padded(*leading) for leading in ((0, 5), (9, 2), (0, 5), (20, 20))]
    attention = serve(subject, kernel, dtype, masks, keys=KEYS, unequal_lengths=True)
    for number, mask in enumerate(masks):
        assert mask.key_valid is not None
        try:
            expect_visible(attention.weights(mask, 1, KEYS, rows=2), mask.key_valid[:, None, :])
        except CheckFailed as failure:
            raise CheckFailed(f"call {number + 1} with padding of equal shape: {failure}") from failure
    return ""


def _random(attention: Attention, rows: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    heads_of = (NUM_HEADS, attention.num_kv_heads, attention.num_kv_heads)
    shapes = [(rows, KEYS, heads, attention.head_dim) for heads in heads_of]
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return q, k, v


def _with_gradients(attention: Attention, inputs: Sequence[Tensor], mask: MaskSpec) -> dict[str, Tensor]:
    leaves = [x.to(attention.subject.device, attention.dtype).requires_grad_() for x in inputs]
    out = attention(leaves[0], leaves[1], leaves[2], mask)
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    parts = {"the output": out.detach()}
    if attention.kernel.deterministic:  # else gradients differ in their last bits from one run to the next anyway
        parts |= {f"the gradient of {n}": g for n, g in zip("qkv", grads, strict=True)}
    return parts


CHECKS: dict[str, tuple[str, MaskCheck]] = {
    "mask.causal": ("a query sees its own key and every earlier one, and no other", _check_causal),
    "mask.full": ("attention that is not causal sees every key", _check_full),
    "mask.alignment": ("fewer queries than keys are the last ones (bottom right)", _check_alignment),
    "mask.window": ("a query sees as many latest keys as the window says", _check_window),
    "mask.packed": ("packed samples see themselves alone", _check_packed),
    "mask.packed_window": ("a window does not reach out of a packed sample", _check_packed_window),
    "mask.padding": ("padded keys are not seen, valid ones are", _check_padding),
    "mask.empty_rows": ("a query that sees nothing gives zeros, and finite gradients", _check_empty_rows),
    "mask.isolation": ("new content in one packed sample changes no bit of another", _check_isolation),
    "mask.fresh": ("each call masks by its own boundaries, whatever the calls before it", _check_fresh),
    "mask.switching": ("a call of one kind of mask leaves nothing behind for the next kind", _check_switching),
    "mask.fresh_padding": ("each call masks by its own padding, whatever the calls before it", _check_fresh_padding),
}
