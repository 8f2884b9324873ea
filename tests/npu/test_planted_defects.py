"""The conformance kit on an NPU: a defect planted into the backend's way to torch_npu fails the check meant for it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from llava_core.testing.conformance import Subject, all_checks
from llava_core.testing.conformance.check import run_check
from llava_core.testing.conformance.pytest_class import process_settings
from llava_core.testing.conformance.result import Status
from llava_cpu.backend import CpuBackend
from llava_npu import devices, lowering
from llava_npu.backend import NpuBackend

pytestmark = pytest.mark.npu


@pytest.fixture(autouse=True)
def _settings(device: torch.device) -> Iterator[None]:
    if not devices.is_second_generation(devices.soc_name() or ""):
        pytest.skip("this chip runs the references: there is nothing to plant a defect into")
    with process_settings():
        yield


def failing(target: str, names: set[str]) -> set[str]:
    """Those of the checks of these names that fail for the kernel, in fp32."""
    checks = all_checks(Subject(NpuBackend(), CpuBackend(), None))
    chosen = [c for c in checks if c.name in names and c.target.startswith(target) and c.target.endswith("float32")]
    results = [run_check(check) for check in chosen]
    assert {r.name for r in results if r.status is not Status.SKIPPED} == names, "not all of them apply"
    return {result.name for result in results if result.status is Status.FAILED}


def with_arguments(op: str, change: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Plants `change(the op, its arguments …)` in place of torch_npu's op."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        import torch_npu

        patch.setattr(torch_npu, op, functools.partial(change, getattr(torch_npu, op)))

    return plant


def in_lowering(name: str, value: Any) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(lowering, name, value)


def inverted(op: Callable[..., Any], *args: Any, sparse_mode: int = 0, atten_mask: Any = None, **rest: Any) -> Any:
    mask = ~atten_mask if sparse_mode == lowering.ALL_MASK else atten_mask
    return op(*args, sparse_mode=sparse_mode, atten_mask=mask, **rest)


def without_scale(op: Callable[..., Any], *args: Any, scale: float, **rest: Any) -> Any:
    return op(*args, **rest)


def without_window(op: Callable[..., Any], *args: Any, sparse_mode: int = 0, **rest: Any) -> Any:
    band = sparse_mode == lowering.BAND
    kept = {k: v for k, v in rest.items() if not (band and k in ("pre_tockens", "next_tockens"))}
    return op(*args, sparse_mode=lowering.BOTTOM_RIGHT_CAUSAL if band else sparse_mode, **kept)


def none_for_causal(op: Callable[..., Any], *args: Any, atten_mask: Any = None, **rest: Any) -> Any:
    return op(*args, atten_mask=None if rest.get("sparse_mode") == lowering.BOTTOM_RIGHT_CAUSAL else atten_mask, **rest)


def past_the_boundary(op: Callable[..., Any], *args: Any, **rest: Any) -> Any:
    for key in ("actual_seq_qlen", "actual_seq_kvlen"):
        if len(rest.get(key, ())) > 1:
            rest[key] = [rest[key][0] + 1, *rest[key][1:]]
    return op(*args, **rest)


def swapped_halves(op: Callable[..., Any], x: torch.Tensor) -> Any:
    return op(torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1))


def default_epsilon(op: Callable[..., Any], x: torch.Tensor, weight: torch.Tensor, *, epsilon: float) -> Any:
    return op(x, weight)


def interleaved(op: Callable[..., Any], *args: Any) -> Any:
    return op(*args, rotary_mode="interleave")


def one_loss_for_all(op: Callable[..., Any], *args: Any, **rest: Any) -> Any:
    loss, *others = op(*args, **rest)
    return loss.mean().expand_as(loss), *others


@functools.cache
def stale_padding(shape: torch.Size) -> list[torch.Tensor]:
    return []


def cached_mask(op: Callable[..., Any], *args: Any, atten_mask: Any = None, sparse_mode: int = 0, **rest: Any) -> Any:
    """A mask cached by its shape, as the compressed one may be and a padded one may not."""
    if sparse_mode == lowering.ALL_MASK:
        kept = stale_padding(atten_mask.shape)
        kept.append(atten_mask)
        atten_mask = kept[0]
    return op(*args, atten_mask=atten_mask, sparse_mode=sparse_mode, **rest)


FUSION = "npu_fusion_attention"
DEFECTS = {
    # what is planted; the kernel; the checks that must fail
    "top_left_for_bottom_right": (in_lowering("BOTTOM_RIGHT_CAUSAL", 2), "attention/fusion", {"mask.alignment"}),
    "inverted_mask": (with_arguments(FUSION, inverted), "attention/fusion", {"mask.padding", "mask.empty_rows"}),
    "dropped_scale": (with_arguments(FUSION, without_scale), "attention/fusion", {"kernel.accuracy"}),
    "ignored_window": (
        with_arguments(FUSION, without_window),
        "attention/fusion",
        {"mask.window", "mask.packed_window"},
    ),
    "full_for_causal": (with_arguments(FUSION, none_for_causal), "attention/fusion", {"mask.causal"}),
    "past_the_boundary": (
        with_arguments(FUSION, past_the_boundary),
        "attention/fusion",
        {"mask.packed", "mask.isolation"},
    ),
    "stale_mask": (with_arguments(FUSION, cached_mask), "attention/fusion", {"mask.fresh_padding"}),
    "swapped_halves": (with_arguments("npu_swiglu", swapped_halves), "swiglu/npu", {"kernel.accuracy"}),
    "dropped_epsilon": (with_arguments("npu_rms_norm", default_epsilon), "rms_norm/npu", {"refusal.honoured"}),
    "interleaved": (with_arguments("npu_rotary_mul", interleaved), "rotary/npu", {"kernel.accuracy"}),
    "one_loss": (
        with_arguments("npu_cross_entropy_loss", one_loss_for_all),
        "linear_cross_entropy/npu",
        {"kernel.accuracy", "refusal.honoured"},
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_found(monkeypatch: pytest.MonkeyPatch, defect: str) -> None:
    plant, target, expected = DEFECTS[defect]
    plant(monkeypatch)
    stale_padding.cache_clear()
    assert failing(target, expected) == expected


@pytest.mark.parametrize("target", sorted({target for _, target, _ in DEFECTS.values()}))
def test_without_one_nothing_is(target: str) -> None:
    names = set().union(*(expected for _, of, expected in DEFECTS.values() if of == target))
    assert failing(target, names) == set()
