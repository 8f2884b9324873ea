"""The kit on the cpu backend: its class for pytest, certificates and their renderings, and the choice of checks."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

import llava_core
from llava_core.backend import CATALOGUE, Probe
from llava_core.errors import BackendUnavailable, ConfigError
from llava_core.plugins import Registry
from llava_core.testing.conformance import (
    BackendConformance,
    Certificate,
    Result,
    Status,
    Subject,
    all_checks,
    build_subject,
    certify,
    select_checks,
)
from llava_core.testing.conformance.check import Check, CheckFailed, CheckSkipped, run_check
from llava_core.testing.conformance.page import render_page
from llava_core.testing.conformance.pytest_class import process_settings
from llava_core.testing.conformance.summary import skips, summarise, verdict
from llava_core.testing.conformance.terminal import first_of_each, print_certificate
from llava_cpu.backend import CpuBackend

KERNEL_TOPICS = ("kernel.", "mask.", "refusal.")
PROCESS_TOPICS = ("plugin.", "collectives.")


def is_quick(check: Check) -> bool:
    """Kernels in bf16, in which every kernel of the cpu backend computes; nothing that starts processes."""
    if check.name.startswith(KERNEL_TOPICS):
        return check.target.endswith("bfloat16")
    return not check.name.startswith(PROCESS_TOPICS)


class TestCpu(BackendConformance):
    """As a vendor's test file has it, save for the choice: the slow test of the whole kit runs the rest."""

    backend = "cpu"

    @classmethod
    def checks(cls) -> list[Check]:
        return [check for check in super().checks() if is_quick(check)]


def subject() -> Subject:
    registry = Registry.discover()
    return build_subject(registry.load("backend", "cpu")(), registry)


@pytest.mark.slow
def test_the_whole_kit_passes_on_the_cpu() -> None:
    heard: list[Result] = []
    with process_settings():
        tested = subject()
        certificate = certify(tested, all_checks(tested), heard.append)
    assert [f"{c.id}: {c.message}" for c in certificate.failures()] == []
    assert certificate.ok
    assert certificate.checks == tuple(heard)
    passed = {c.name for c in certificate.checks if c.status is Status.PASSED}
    # What a host cannot be asked, and what the cpu backend has none of.
    assert {c.name for c in certificate.checks} - passed == {"sync.step", "patches.apply_and_undo"}


def test_every_check_has_an_id_of_its_own_and_says_what_it_means() -> None:
    checks = all_checks(subject())
    assert len({check.id for check in checks}) == len(checks)
    assert all(check.explanation for check in checks)


def test_every_kernel_of_an_op_meets_every_case_in_every_dtype() -> None:
    tested = subject()
    names = {check.id for check in all_checks(tested)}
    for kernel, dtype in tested.kernel_dtypes():
        for case in CATALOGUE[kernel.op].cases:
            target = f"{kernel.op}/{kernel.name}/{case.name}/{str(dtype).removeprefix('torch.')}"
            assert f"kernel.accuracy[{target}]" in names


def test_checks_are_chosen_by_op_and_by_case() -> None:
    checks = all_checks(subject())
    norm = select_checks(checks, op="rms_norm")
    assert norm
    assert {check.target.split("/")[0] for check in norm} == {"rms_norm"}
    decode = select_checks(checks, case="decode")
    assert decode
    assert {check.target.split("/")[2] for check in decode} == {"decode"}
    assert select_checks(checks, op="attention", case="decode") == decode
    assert select_checks(checks) == checks


@pytest.mark.parametrize(
    ("op", "case", "message"),
    [
        ("atention", None, "unknown op 'atention'.*Did you mean 'attention'"),
        (None, "decode_paded", "unknown case 'decode_paded'.*Did you mean 'decode_padded'"),
        ("swiglu", "decode", "unknown case of swiglu 'decode'; there are: rows"),
    ],
)
def test_a_name_that_does_not_exist_names_the_nearest(op: str | None, case: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select_checks(all_checks(subject()), op, case)


def result(status: Status, name: str = "kernel.accuracy", message: str = "") -> Result:
    return Result(name, f"swiglu/<mine>/{status.value}", status, "answers are right", message, 0.5)


CERTIFICATE = Certificate(
    "mine",
    "Device & Co",
    "2 devices",
    "2026-01-31",
    {"torch": "2.13.0"},
    (
        result(Status.PASSED),
        result(Status.FAILED, message="off by <3> & more"),
        result(Status.SKIPPED, message="refused: no"),
        result(Status.SKIPPED, "sync.step", "PyTorch cannot tell"),
    ),
)


def test_a_certificate_returns_from_its_json() -> None:
    assert Certificate.from_json(CERTIFICATE.to_json()) == CERTIFICATE
    plain = json.loads(CERTIFICATE.to_json())
    assert [plain[key] for key in ("format", "passed", "failed", "skipped")] == [1, 1, 1, 2]
    assert plain["checks"][1]["status"] == "failed"


def test_json_of_another_format_is_refused() -> None:
    with pytest.raises(ValueError, match="format 2"):
        Certificate.from_json(CERTIFICATE.to_json().replace('"format": 1', '"format": 2'))


@pytest.mark.parametrize(
    ("statuses", "ok"),
    [
        ([Status.PASSED, Status.SKIPPED], True),
        ([Status.PASSED, Status.FAILED], False),
        ([Status.SKIPPED], False),  # nothing was shown
        ([], False),
    ],
)
def test_only_what_was_checked_and_did_not_fail_is_ok(statuses: list[Status], ok: bool) -> None:
    certificate = Certificate("mine", "", "", "", {}, tuple(map(result, statuses)))
    assert certificate.ok is ok
    assert ("conforms" in verdict(certificate)) is ok


def test_the_summary_has_a_line_for_each_name_with_the_worst_status() -> None:
    accuracy, sync = summarise(CERTIFICATE)
    assert (accuracy.name, accuracy.status, accuracy.counts[Status.PASSED]) == ("kernel.accuracy", Status.FAILED, 1)
    assert sync.status is Status.SKIPPED


def test_skips_are_gathered_by_reason() -> None:
    assert skips(CERTIFICATE) == [
        ("swiglu/<mine> (1 skipped)", "refused: no"),
        ("swiglu/<mine> (1 skipped)", "PyTorch cannot tell"),
    ]


class References(HTMLParser):
    """Every tag, and every attribute that could refer to something else."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def test_the_page_refers_to_nothing_and_shows_every_failure() -> None:
    page = render_page(CERTIFICATE)
    found = References()
    found.feed(page)
    assert found.attributes <= {"lang", "charset", "class"}
    assert not found.tags & {"link", "script", "img", "iframe", "a"}
    assert not any(word in page for word in ("http", "src=", "url(", "@import"))
    assert "off by &lt;3&gt; &amp; more" in page
    assert "does not conform" in page


def test_the_terminal_shows_each_failure_and_the_verdict() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    print_certificate(CERTIFICATE, console)
    text = console.export_text()
    assert "kernel.accuracy[swiglu/<mine>/failed]" in text
    assert "off by <3> & more" in text
    assert "mine does not conform: 1 passed, 1 failed, 2 skipped" in text


def test_of_many_failures_the_terminal_shows_the_first_of_each_check_and_kernel() -> None:
    failed = [
        Result(name, f"attention/{kernel}/{case}/float32", Status.FAILED, "", f"{case} is wrong", 0.1)
        for name in ("kernel.accuracy", "mask.causal")
        for kernel in ("fused", "slow")
        for case in ("full", "causal", "packed")
    ]
    shown = first_of_each(failed)
    assert [(f.name, f.target) for f in shown] == [
        ("kernel.accuracy", "attention/fused/full/float32"),
        ("kernel.accuracy", "attention/slow/full/float32"),
        ("mask.causal", "attention/fused/full/float32"),
        ("mask.causal", "attention/slow/full/float32"),
    ]


def test_listing_the_checks_opens_no_device() -> None:
    tested = subject()
    assert all_checks(tested)
    assert not vars(tested).keys() & {"hardware", "host_hardware"}


class Absent(CpuBackend):
    """A backend without its device."""

    name = "absent"

    @classmethod
    def probe(cls) -> Probe:
        return Probe(False, "no device here")


def test_without_its_device_a_backend_is_skipped_with_the_probes_reason() -> None:
    tested = Subject(Absent(), CpuBackend())
    chosen = [c for c in all_checks(tested) if c.op == "swiglu" or c.name.startswith(("rng.", "ladder."))]
    results = [run_check(check) for check in chosen]
    assert {r.message for r in results if r.status is not Status.PASSED} == {
        "the backend cannot run here: no device here"
    }
    assert {r.name for r in results if r.status is Status.PASSED} == {"refusal.reasons"}


def test_a_backend_without_its_device_gets_no_certificate() -> None:
    with pytest.raises(BackendUnavailable, match="no device here"):
        certify(Subject(Absent(), CpuBackend()), [])


def test_a_class_is_tested_as_a_name_is() -> None:
    class Mine(BackendConformance):
        backend = Absent

    class Cpu(BackendConformance):
        backend = "cpu"

    assert [check.id for check in Mine.checks()] == [check.id for check in Cpu.checks()]


def test_nothing_but_the_command_line_uses_the_kit() -> None:
    core = Path(llava_core.__file__).parent
    users = {
        path.relative_to(core).parts[0]
        for path in core.rglob("*.py")
        if "llava_core.testing.conformance" in path.read_text(encoding="utf-8")
    }
    assert users == {"cli", "testing"}


def outcome(run: Callable[[], str]) -> BaseException | None:
    """What the class's test ends with for a check that runs this."""
    try:
        BackendConformance().test_conforms(Check("mask.causal", "attention/mine/float32", "sees the past", run))
    except (pytest.fail.Exception, pytest.skip.Exception) as ended:
        return ended
    return None


def raises(error: Exception) -> Callable[[], str]:
    def run() -> str:
        raise error

    return run


def test_in_pytest_a_check_passes_fails_or_is_skipped() -> None:
    assert outcome(lambda: "") is None
    failed = outcome(raises(CheckFailed("query 0 sees key 1")))
    assert isinstance(failed, pytest.fail.Exception)
    assert "sees the past: query 0 sees key 1" in str(failed)
    skipped = outcome(raises(CheckSkipped("refused: no masks")))
    assert isinstance(skipped, pytest.skip.Exception)
    assert "refused: no masks" in str(skipped)
    crashed = outcome(raises(OSError("undefined symbol")))
    assert isinstance(crashed, pytest.fail.Exception)
    assert "OSError: undefined symbol" in str(crashed)
