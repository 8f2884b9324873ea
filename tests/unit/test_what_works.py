"""README.md's table of what works where is the certificates' own word."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from llava_core.testing.conformance import Certificate, Result, Status

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def what_works() -> ModuleType:
    spec = importlib.util.spec_from_file_location("what_works", ROOT / "docs" / "what_works.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def certificate(device: str, *ends: tuple[str, Status]) -> Certificate:
    checks = tuple(Result(name, "", status, "", "", 0.1) for name, status in ends)
    return Certificate("mine", device, "1 device", "2026-01-31", {"torch": "2.13.0"}, checks)


def test_the_readme_has_the_table_of_the_certificates(what_works: ModuleType) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = what_works.table(what_works.read_certificates(ROOT / "docs" / "certificates"))
    assert what_works.with_table(readme, table) == readme, "run `python docs/what_works.py`"


def test_the_certificates_are_green_and_have_every_topic(what_works: ModuleType) -> None:
    known = {topic for topics in what_works.TOPICS.values() for topic in topics}
    for found in what_works.read_certificates(ROOT / "docs" / "certificates").values():
        assert found is None or found.ok
        assert found is None or {check.name.partition(".")[0] for check in found.checks} == known


def test_failures_come_first_and_what_was_not_run_is_unverified(what_works: ModuleType) -> None:
    mine = certificate(
        "Chip", ("mask.full", Status.PASSED), ("mask.causal", Status.FAILED), ("rng.seed", Status.SKIPPED)
    )
    assert what_works.cell(mine, ("mask",)) == "**1 FAILED**, 1 passed"
    assert what_works.cell(mine, ("rng",)) == "1 skipped"
    assert what_works.cell(mine, ("ladder",)) == "unverified"
    assert what_works.cell(None, ("mask",)) == "unverified"


def test_a_simulated_device_is_called_so(what_works: ModuleType) -> None:
    assert what_works.heading("mine", certificate("Chip (simulated by a tool)")) == "mine, **simulated**"
    assert what_works.heading("mine", certificate("Chip")) == "mine"


def test_a_readme_without_its_place_is_an_error(what_works: ModuleType) -> None:
    with pytest.raises(ValueError, match="no place for the table"):
        what_works.with_table("nothing", "table")
