"""`llava-core certify`: exit codes and the files it writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llava_core.testing.conformance import Certificate, Status
from llava_core.testing.conformance.pytest_class import process_settings
from tests.unit.cli.support import run


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    with process_settings():
        yield


def test_a_conforming_backend_exits_with_0_and_writes_both_files(capsys, tmp_path: Path) -> None:
    files = {"--json": tmp_path / "new/cpu.json", "--html": tmp_path / "new/cpu.html"}
    options = [word for pair in files.items() for word in pair]
    done = run(capsys, "certify", "--backend", "cpu", "--op", "swiglu", *options)
    assert done.code == 0, done.err
    assert "cpu conforms" in done.out
    certificate = Certificate.from_json(files["--json"].read_text(encoding="utf-8"))
    assert (certificate.backend, certificate.ok) == ("cpu", True)
    assert certificate.count(Status.PASSED) > 10
    page = files["--html"].read_text(encoding="utf-8")
    assert "cpu conforms" in page
    assert "http" not in page


def test_only_the_case_asked_for_is_checked(capsys, tmp_path: Path) -> None:
    file = tmp_path / "cpu.json"
    assert run(capsys, "certify", "--backend", "cpu", "--case", "decode", "--json", file).code == 0
    certificate = Certificate.from_json(file.read_text(encoding="utf-8"))
    assert {check.target.split("/")[2] for check in certificate.checks} == {"decode"}


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed plugin whose swiglu has its halves swapped."""
    info = tmp_path / "site/broken-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[llava_core]\nbroken = broken_plugin\n")
    (tmp_path / "site/broken_plugin.py").write_text(
        "from llava_core.plugins import Contribution, hookimpl\n"
        "@hookimpl\n"
        "def llava_register_backends():\n"
        "    return [Contribution('broken', 'broken_backend:BrokenBackend', 'for a test', api_version=1)]\n"
    )
    (tmp_path / "site/broken_backend.py").write_text(
        "from torch.nn.functional import silu\n"
        "from llava_core.backend import KernelSpec\n"
        "from llava_core.backend.kernels import always\n"
        "from llava_cpu.backend import CpuBackend\n"
        "def swiglu(gate, up):\n"
        "    return silu(up) * gate\n"
        "class BrokenBackend(CpuBackend):\n"
        "    name = 'broken'\n"
        "    def kernels(self):\n"
        "        return [KernelSpec('swiglu', 'swapped', 'broken_backend:swiglu', 10, always)]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))


@pytest.mark.usefixtures("broken")
def test_a_failure_exits_with_1_and_is_named(capsys, tmp_path: Path) -> None:
    file = tmp_path / "broken.json"
    done = run(capsys, "certify", "--backend", "broken", "--op", "swiglu", "--json", file)
    assert done.code == 1
    assert "kernel.accuracy[swiglu/swapped/rows/float32]" in done.out
    assert "broken does not conform" in done.out
    failed = {check.target.split("/")[1] for check in Certificate.from_json(file.read_text()).failures()}
    assert failed == {"swapped"}, "the reference beside it is right"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--op", "swigluu"), "Did you mean 'swiglu'?"),
        (("--case", "packed_causl"), "Did you mean 'packed_causal'?"),
        (("--backend", "cpuu"), "Did you mean 'cpu'?"),
    ],
)
def test_a_name_that_does_not_exist_exits_with_2(capsys, options: tuple[str, str], message: str) -> None:
    done = run(capsys, "certify", *options)
    assert (done.code, message in done.err) == (2, True), done.err
