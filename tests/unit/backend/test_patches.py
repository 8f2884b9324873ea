"""Patch records: the ledger that shows them, and the check that applies and undoes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from rich.console import Console

from llava_core.backend import Backend, No, Patch
from llava_core.backend.kernels import Verdict
from llava_core.cli.patches import patch_table
from llava_core.errors import PatchRefused
from llava_core.testing.conformance import Result, Status, Subject, all_checks
from llava_core.testing.conformance.check import run_check
from llava_cpu.backend import CpuBackend
from tests.unit.cli.support import run
from tests.unit.testing.mutant_backends import Patching, RefusingPatch


def ledger(patch: Patch) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(patch_table(patch))
    return captured.get()


def answering(applies: Callable[[], Verdict]) -> Patch:
    return replace(Patching().patches()[0], applies=applies)


def refuse() -> Verdict:
    raise PatchRefused("expected [1.0]; found [1.1]")


@pytest.mark.parametrize("word", ["answer", "mutant_backends:Library.answer", "41 is wrong", "this file", "it says 42"])
def test_the_ledger_shows_what_is_known_of_a_patch(word: str) -> None:
    assert word in ledger(Patching().patches()[0])


@pytest.mark.parametrize(
    ("patch", "state"),
    [
        (Patching().patches()[0], "applies"),
        (answering(lambda: No("vendorlib is not installed")), "not applicable: vendorlib is not installed"),
        (answering(refuse), "refused: expected [1.0]; found [1.1]"),
    ],
    ids=["applies", "not applicable", "refused"],
)
def test_the_ledger_says_how_it_stands_here(patch: Patch, state: str) -> None:
    assert f"{state} " in ledger(patch).partition("here")[2]


def test_a_backend_without_patches_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    done = run(capsys, "backends", "cpu", "--patches")
    assert (done.code, done.out) == (0, "cpu patches no other library.\n")


def test_patches_are_those_of_one_backend(capsys: pytest.CaptureFixture[str]) -> None:
    done = run(capsys, "backends", "--patches")
    assert (done.code, "`llava-core backends NAME --patches`" in done.err) == (2, True)


def check(backend: Backend) -> Result:
    subject = Subject(backend, CpuBackend())
    (chosen,) = [one for one in all_checks(subject) if one.name == "patches.apply_and_undo"]
    return run_check(chosen)


def test_a_backend_that_patches_nothing_is_skipped_by_the_check() -> None:
    found = check(CpuBackend())
    assert (found.status, found.message) == (Status.SKIPPED, "the backend patches nothing")


@pytest.mark.parametrize(
    ("applies", "reason"),
    [(lambda: No("vendorlib is not installed"), "vendorlib is not installed"), (refuse, "refused: expected [1.0]")],
    ids=["not installed", "refused"],
)
def test_a_patch_that_does_not_apply_is_skipped_with_its_reason(applies: Callable[[], Verdict], reason: str) -> None:
    class Elsewhere(CpuBackend):
        def patches(self) -> Sequence[Patch]:
            return [answering(applies)]

    found = check(Elsewhere())
    assert found.status is Status.SKIPPED
    assert found.message.startswith(reason)


@pytest.mark.slow
def test_a_patch_that_is_undone_passes() -> None:
    found = check(Patching())
    assert (found.status, found.target) == (Status.PASSED, "answer"), found.message


@pytest.mark.slow
def test_a_patch_that_says_it_applies_and_then_refuses_fails_with_its_reason() -> None:
    found = check(RefusingPatch())
    assert found.status is Status.FAILED
    assert found.message == "it says that it applies here, and then refuses: expected 41; found 40"
