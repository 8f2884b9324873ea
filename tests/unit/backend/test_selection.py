"""Which kernel is chosen, and that each rejected one says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_core.backend import KernelSpec, No, OpRequest, reference_kernels, select, select_all
from llava_core.backend import reference as reference_ops
from llava_core.backend.kernels import always
from llava_core.errors import KernelUnavailable

LOAD = "llava_core.backend.reference:swiglu"


def kernel(name: str, priority: int, load: str = LOAD, **options: Any) -> KernelSpec:
    return KernelSpec("swiglu", name, load, priority, options.pop("supports", always), **options)


def request(**changes: Any) -> OpRequest:
    facts = {"dtype": torch.float32, "needs_grad": True, "deterministic": False}
    return OpRequest("swiglu", "swiglu", **(facts | changes))


def refuses(reason: str) -> Callable[[OpRequest], No]:
    return lambda _: No(reason)


def test_the_highest_priority_wins_whatever_the_order() -> None:
    kernels = [kernel("low", 1), kernel("high", 20), kernel("middle", 5), *reference_kernels()]
    selection = select(kernels, request())
    assert selection.kernel.name == "high"
    assert selection.function is reference_ops.swiglu
    assert selection.rejected == ()


def test_kernels_of_other_ops_are_no_candidates() -> None:
    other = KernelSpec("rms_norm", "other", "llava_core.backend.reference:rms_norm", 99, always)
    assert select([other, kernel("own", 1)], request()).kernel.name == "own"


def test_each_kernel_above_the_chosen_one_gives_its_reason_best_first() -> None:
    kernels = [kernel("b", 20, supports=refuses("second")), kernel("a", 30, supports=refuses("first")), kernel("c", 1)]
    selection = select(kernels, request())
    assert selection.kernel.name == "c"
    assert selection.rejected == (("a", "first"), ("b", "second"))


def test_a_library_that_is_not_installed_is_a_reason() -> None:
    missing = kernel("vendor", 20, load="no_such_library.ops:f", requires="no_such_library")
    assert select([missing, kernel("own", 1)], request()).rejected == (("vendor", "no_such_library is not installed"),)


def test_a_submodule_of_a_library_that_is_not_installed_is_a_reason() -> None:
    missing = kernel("vendor", 20, load="no_such_library.ops:f", requires="no_such_library.ops")
    assert select([missing, kernel("own", 1)], request()).kernel.name == "own"


@pytest.mark.parametrize("fault", ["import no_such_library", "raise OSError('undefined symbol')", "1 / 0"])
def test_a_library_that_breaks_at_import_is_a_reason(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_vendor.py").write_text(fault)
    monkeypatch.syspath_prepend(tmp_path)
    broken = kernel("vendor", 20, load="broken_vendor:f", requires="broken_vendor")
    selection = select([broken, kernel("own", 1)], request())
    assert selection.kernel.name == "own"
    ((name, reason),) = selection.rejected
    assert name == "vendor"
    assert reason.startswith("cannot be imported: ")


def test_a_function_that_the_library_lacks_is_a_reason() -> None:
    stale = kernel("vendor", 20, load="llava_core.backend.reference:no_such_function")
    ((_, reason),) = select([stale, kernel("own", 1)], request()).rejected
    assert "no_such_function" in reason


def test_a_kernel_that_is_not_chosen_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "untouched_vendor.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    selection = select([kernel("low", 1, load="untouched_vendor:f"), kernel("own", 20)], request())
    assert selection.kernel.name == "own"


def test_determinism_rejects_what_is_not_deterministic() -> None:
    kernels = [kernel("fast", 20, deterministic=False), kernel("steady", 1)]
    assert select(kernels, request()).kernel.name == "fast"
    selection = select(kernels, request(deterministic=True))
    assert selection.kernel.name == "steady"
    assert selection.rejected == (("fast", "not deterministic"),)


def test_a_pin_wins_over_priority_and_is_asked_alone() -> None:
    selection = select([kernel("high", 20), kernel("low", 1)], request(), pin="low")
    assert selection.kernel.name == "low"
    assert selection.rejected == ()


def test_an_unknown_pin_names_what_there_is() -> None:
    with pytest.raises(KernelUnavailable, match=r"no kernel 'hihg' for swiglu; there are: high, low\."):
        select([kernel("low", 1), kernel("high", 20)], request(), pin="hihg")


def test_a_pinned_kernel_that_cannot_run_raises_with_the_reason() -> None:
    kernels = [kernel("vendor", 20, supports=refuses("only fp8")), *reference_kernels()]
    with pytest.raises(KernelUnavailable, match=r"'vendor':\n  vendor: only fp8"):
        select(kernels, request(), pin="vendor")


def test_a_pinned_kernel_whose_library_is_missing_raises() -> None:
    with pytest.raises(KernelUnavailable, match="no_such_library is not installed"):
        select([kernel("vendor", 20, requires="no_such_library"), kernel("own", 1)], request(), pin="vendor")


def test_no_kernel_at_all_raises_with_every_reason() -> None:
    kernels = [kernel("a", 2, supports=refuses("too small")), kernel("b", 1, supports=refuses("too old"))]
    with pytest.raises(KernelUnavailable, match=r"any kernel:\n  a: too small\n  b: too old"):
        select(kernels, request())


def test_select_all_answers_each_site_and_pins_by_site() -> None:
    first, second = request(), OpRequest("rms_norm", "rms_norm", torch.float32, True, False)
    kernels = [kernel("fast", 20), *reference_kernels()]
    selections = select_all(kernels, [first, second], {"swiglu": "reference"})
    assert {site: s.kernel.name for site, s in selections.items()} == {"swiglu": "reference", "rms_norm": "reference"}


def test_a_pin_for_a_site_that_the_model_lacks_raises() -> None:
    with pytest.raises(
        KernelUnavailable, match=r"pinned for \['vision_attention'\]; this model's sites are \['swiglu'"
    ):
        select_all(reference_kernels(), [request()], {"vision_attention": "sdpa"})
