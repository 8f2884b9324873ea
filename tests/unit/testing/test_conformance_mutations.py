"""The kit itself: every planted defect fails the check that is meant for it, and what has no defect passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from llava_core.backend import CATALOGUE, Backend, KernelSpec, No
from llava_core.backend.kernels import always
from llava_core.plugins import Registry
from llava_core.testing.conformance import Result, Status, Subject, all_checks
from llava_core.testing.conformance.check import run_check
from llava_core.testing.conformance.pytest_class import process_settings
from llava_cpu.backend import CpuBackend
from tests.unit.testing import mutant_backends
from tests.unit.testing.mutant_backends import Mutant, with_part
from tests.unit.testing.mutants import mutant_kernel

FP32, HALF = (torch.float32,), (torch.float16,)


def subject(backend: Backend, plugin_module: str | None = None) -> Subject:
    return Subject(backend, CpuBackend(), plugin_module)


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    with process_settings():
        yield


def failures(tested: Subject, chosen: Callable[[str, str], bool]) -> list[Result]:
    """What fails of the checks chosen by name and target; something must have been checked."""
    results = [run_check(check) for check in all_checks(tested) if chosen(check.name, check.target)]
    assert any(result.status is not Status.SKIPPED for result in results), "nothing was checked"
    return [result for result in results if result.status is Status.FAILED]


def kernel_failures(kernel: KernelSpec, dtypes: tuple[torch.dtype, ...]) -> list[Result]:
    return failures(subject(Mutant(kernel, dtypes=dtypes)), lambda _, target: target.startswith(f"{kernel.op}/mutant"))


KERNELS = [
    # op, the mutant, checks that must fail
    ("attention", "inverted_mask", {"mask.causal", "mask.alignment", "mask.packed", "kernel.accuracy"}),
    ("attention", "full_for_causal", {"mask.causal", "refusal.honoured", "kernel.accuracy"}),
    ("attention", "always_causal", {"mask.full", "kernel.accuracy"}),
    ("attention", "top_left", {"mask.alignment", "refusal.honoured", "kernel.accuracy"}),
    ("attention", "scale_dropped", {"refusal.honoured"}),
    ("attention", "window_ignored", {"mask.window", "mask.packed_window", "refusal.honoured", "kernel.accuracy"}),
    ("attention", "window_across_samples", {"mask.packed_window", "kernel.accuracy"}),
    ("attention", "key_padding_ignored", {"mask.padding", "mask.fresh_padding", "refusal.honoured"}),
    ("attention", "samples_ignored", {"mask.packed", "mask.isolation", "refusal.honoured"}),
    ("attention", "nan_in_empty_rows", {"mask.empty_rows", "kernel.accuracy"}),
    ("attention", "cached_shape", {"mask.fresh"}),
    ("attention", "cached_address", {"mask.fresh"}),
    ("attention", "cached_padding", {"mask.fresh_padding"}),
    ("attention", "mode_left_behind", {"mask.switching"}),
    ("attention", "leaks_in_backward", {"mask.isolation", "kernel.accuracy"}),
    ("swiglu", "swapped_swiglu", {"kernel.accuracy", "refusal.honoured"}),
    ("swiglu", "assumes_contiguous", {"kernel.strided"}),
    ("swiglu", "spoils_gradient", {"kernel.inputs_unchanged"}),
    ("swiglu", "wrong_without_gradients", {"kernel.inference"}),
    ("rotary", "half_a_rotary", {"kernel.accuracy", "kernel.inference"}),
    ("rotary", "swapped_rotary", {"kernel.accuracy"}),
    ("rotary", "interleaved_rotary", {"kernel.accuracy"}),
    ("rotary", "rotary_in_place", {"kernel.inputs_unchanged"}),
    ("rms_norm", "wrong_gradient", {"kernel.accuracy"}),
    ("rms_norm", "eps_ignored", {"refusal.honoured"}),
    ("rms_norm", "reads_past_the_end", {"kernel.bounds"}),
    ("rms_norm", "not_repeatable", {"kernel.deterministic"}),
    ("linear_cross_entropy", "unweighted_loss", {"refusal.honoured", "kernel.accuracy"}),
]


@pytest.mark.parametrize(("op", "mutant", "expected"), KERNELS, ids=[mutant for _, mutant, _ in KERNELS])
def test_a_kernels_defect_fails_its_check(op: str, mutant: str, expected: set[str]) -> None:
    found = kernel_failures(mutant_kernel(op, mutant), FP32)
    assert expected <= {result.name for result in found}
    assert {result.target.split("/")[1] for result in found} == {"mutant"}


EXACT = [
    # What nothing but these checks sees. Not `cached_address`: which address is used again is the allocator's affair.
    ("attention", "scale_dropped", {"refusal.honoured"}, "attention/mutant/scale/float32"),
    ("swiglu", "assumes_contiguous", {"kernel.strided"}, "swiglu/mutant/rows/float32"),
    ("swiglu", "spoils_gradient", {"kernel.inputs_unchanged"}, "swiglu/mutant/rows/float32"),
    ("swiglu", "wrong_without_gradients", {"kernel.inference"}, "swiglu/mutant/rows/float32"),
    ("rotary", "rotary_in_place", {"kernel.inputs_unchanged"}, "rotary/mutant/grouped/float32"),
    ("rms_norm", "reads_past_the_end", {"kernel.bounds", "kernel.strided"}, "rms_norm/mutant/rows/float32"),
    ("rms_norm", "eps_ignored", {"refusal.honoured"}, "rms_norm/mutant/eps/float32"),
    ("rms_norm", "not_repeatable", {"kernel.deterministic"}, "rms_norm/mutant/rows/float32"),
]


@pytest.mark.parametrize(("op", "mutant", "names", "target"), EXACT, ids=[case[1] for case in EXACT])
def test_no_other_check_than_the_one_meant_fails(op: str, mutant: str, names: set[str], target: str) -> None:
    found = kernel_failures(mutant_kernel(op, mutant), FP32)
    assert {result.name for result in found} == names
    assert {result.target for result in found} == {target}


NARROW = [("attention", "sums_in_fp16"), ("rms_norm", "squares_in_fp16"), ("linear_cross_entropy", "total_in_fp16")]


@pytest.mark.parametrize(("op", "mutant"), NARROW, ids=[op for op, _ in NARROW])
def test_sums_kept_in_fp16_are_caught_even_in_an_fp16_kernel(op: str, mutant: str) -> None:
    found = kernel_failures(mutant_kernel(op, mutant), HALF)
    assert "kernel.accumulation" in {result.name for result in found}


def test_a_loss_in_half_precision_is_caught_by_its_dtype() -> None:
    found = kernel_failures(mutant_kernel("linear_cross_entropy", "half_precision_loss"), (torch.bfloat16,))
    assert "kernel.accuracy" in {result.name for result in found}


@pytest.mark.parametrize("dtype", mutant_backends.DTYPES, ids=str)
@pytest.mark.parametrize("op", list(CATALOGUE))
def test_what_has_no_defect_passes(op: str, dtype: torch.dtype) -> None:
    assert kernel_failures(mutant_kernel(op, op), (dtype,)) == []


def test_what_is_not_claimed_is_not_asked() -> None:
    kernel = mutant_kernel("rms_norm", "not_repeatable", deterministic=False)
    assert kernel_failures(kernel, FP32) == []


def test_an_honest_refusal_is_a_skip_with_its_reason() -> None:
    def supports(request: Any) -> Any:
        windowed = any(m.window is not None for m in request.masks)
        return No("no windows") if windowed else always(request)

    kernel = replace(mutant_kernel("attention", "window_ignored"), supports=supports)
    assert kernel_failures(kernel, FP32) == []


VERDICTS = {
    "a No without a reason": lambda _: No(""),
    "neither Yes nor No": lambda _: True,
    "raises": lambda request: always(request) if request.head_dim % 8 == 0 else 1 / 0,
}


@pytest.mark.parametrize("supports", VERDICTS.values(), ids=list(VERDICTS))
def test_a_verdict_that_is_none_is_caught(supports: Callable[[Any], Any]) -> None:
    kernel = replace(mutant_kernel("attention", "attention"), supports=supports)
    assert "refusal.reasons" in {result.name for result in kernel_failures(kernel, FP32)}


LISTS = {
    "an op that is not in the catalogue": [mutant_kernel("atention", "attention")],
    "a name twice": [mutant_kernel("swiglu", "swiglu"), mutant_kernel("swiglu", "swiglu", priority=40)],
    "a priority twice": [mutant_kernel("swiglu", "swiglu"), mutant_kernel("swiglu", "swiglu", name="other")],
}


@pytest.mark.parametrize("kernels", LISTS.values(), ids=list(LISTS))
def test_a_list_of_kernels_that_contradicts_itself_is_caught(kernels: list[KernelSpec]) -> None:
    assert failures(subject(Mutant(*kernels)), lambda name, _: name == "kernel.listed")


def no_host_state() -> Backend:
    return with_part(rng=mutant_backends.RngWithoutHost())


BACKENDS = [
    # check, the defect, a backend with it
    ("rng.round_trip", "state that does not return", lambda: with_part(rng=mutant_backends.ForgetfulRng())),
    ("rng.seed", "seed that is ignored", lambda: with_part(rng=mutant_backends.UnseededRng())),
    ("memory.statistics", "peak that never falls", lambda: with_part(memory=mutant_backends.GrowingMemory())),
    ("memory.statistics", "peak that never rises", lambda: with_part(memory=mutant_backends.MutedMemory())),
    ("device.precision", "default that is not computed", mutant_backends.DefaultNotComputed),
    ("optimizer.update", "weight decay left out", mutant_backends.NoDecay),
    ("ladder.activations[float32]", "a defect in one kernel", lambda: ladder_mutant("interleaved_rotary", "rotary")),
    ("ladder.first_step[float32]", "a wrong gradient", lambda: ladder_mutant("wrong_gradient", "rms_norm")),
    ("ladder.training[float32]", "an optimizer that drifts", mutant_backends.DriftingOptimizer),
    ("ladder.checkpoint_to_backend", "moments that are lost", mutant_backends.LosesMoments),
    (
        "ladder.checkpoint_to_backend",
        "states of the host refused",
        no_host_state,
    ),
    ("ladder.checkpoint_to_host", "states no host reads", no_host_state),
]


def ladder_mutant(function: str, op: str) -> Backend:
    return Mutant(mutant_kernel(op, function), dtypes=FP32)


@pytest.mark.parametrize(("check", "defect", "build"), BACKENDS, ids=[case[1] for case in BACKENDS])
def test_a_backends_defect_fails_its_check(check: str, defect: str, build: Callable[[], Backend]) -> None:
    name = check.partition("[")[0]
    found = failures(subject(build()), lambda n, _: n == name)
    assert check in {result.id for result in found}


def test_a_defect_that_only_training_shows_leaves_the_first_step_right() -> None:
    found = failures(
        subject(mutant_backends.DriftingOptimizer()), lambda n, t: n.startswith("ladder.") and t == "float32"
    )
    assert {result.name for result in found} == {"ladder.training"}


class Watched:
    """Stands in for the module of a device that can raise where the host waits for it: here, where a value is read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.mode = "default"
        item = torch.Tensor.item
        monkeypatch.setattr(torch.Tensor, "item", lambda tensor: item(tensor) if self.mode != "error" else self.wait())
        monkeypatch.setattr(torch, "get_device_module", lambda _: self)

    def wait(self) -> None:
        raise RuntimeError("called a synchronizing operation")

    def set_sync_debug_mode(self, mode: str) -> None:
        self.mode = mode

    def get_sync_debug_mode(self) -> str:
        return self.mode


def test_a_kernel_that_waits_for_the_device_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    assert failures(subject(CpuBackend()), lambda name, _: name == "sync.step") == []
    (failure,) = failures(subject(ladder_mutant("reads_back", "swiglu")), lambda name, _: name == "sync.step")
    assert "called a synchronizing operation" in failure.message
    assert watched.mode == "default"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("check", "backend", "message"),
    [
        ("plugin.probe", mutant_backends.RaisingProbe, "libvendor.so"),
        ("plugin.probe", mutant_backends.SilentProbe, "no reason"),
        ("collectives.alone", mutant_backends.SumsWhatItCannot, ""),
        ("collectives.pair", mutant_backends.SumsWhatItCannot, ""),
        ("patches.apply_and_undo", mutant_backends.PatchNotUndone, "changed in answer"),
        ("patches.apply_and_undo", mutant_backends.PatchLeavesMore, "changed in asked"),
        ("patches.apply_and_undo", mutant_backends.PatchRefusedTooLate, "changed in answer"),
        ("patches.apply_and_undo", mutant_backends.PatchBreaks, "no attribute 'reply'"),
        ("patches.apply_and_undo", mutant_backends.PatchWithoutEffect, "does not change"),
    ],
    ids=[
        "raises",
        "silent",
        "alone",
        "pair",
        "not undone",
        "leaves more",
        "refused too late",
        "breaks",
        "without effect",
    ],
)
def test_a_defect_in_a_fresh_process_fails_its_check(check: str, backend: type[Backend], message: str) -> None:
    (failure,) = failures(subject(backend()), lambda n, _: n == check)
    assert message in failure.message


def test_a_plugin_module_that_loads_torch_is_caught() -> None:
    (failure,) = failures(
        subject(CpuBackend(), "tests.unit.testing.mutant_backends"), lambda n, _: n == "plugin.import"
    )
    assert "torch" in failure.message


def test_a_check_that_crashes_has_failed_with_its_traceback() -> None:
    kernel = mutant_kernel("swiglu", "no_such_function")
    found = kernel_failures(kernel, FP32)
    assert any("AttributeError" in result.message and "Traceback" in result.message for result in found)


def test_every_check_has_a_defect_that_fails_it() -> None:
    kernels = set().union(*(expected for _, _, expected in KERNELS))
    backends = {check.partition("[")[0] for check, _, _ in BACKENDS}
    apart = {"kernel.accumulation", "refusal.reasons", "kernel.listed", "plugin.probe", "plugin.import", "sync.step"}
    apart |= {"collectives.alone", "collectives.pair", "patches.apply_and_undo"}
    registry = Registry.discover()
    names = {check.name for check in all_checks(subject(registry.load("backend", "cpu")()))}
    assert names == kernels | backends | apart
