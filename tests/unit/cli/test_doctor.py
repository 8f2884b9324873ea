"""`llava-core doctor` on healthy and on broken environments."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llava_core.cli.doctor import _imports, examine
from tests.unit.cli.support import run


def install(folder: Path, name: str, group: str, module: str, source: str) -> None:
    """A distribution in `folder` with one entry point and one module."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}:load\n")
    (folder / f"{module}.py").write_text(source)


def test_it_prints_versions_backends_and_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    done = run(capsys, "doctor")
    assert "import torch" in done.out
    assert "backend cpu" in done.out
    # A busy machine is a finding, and so is 1; anything else would be a crash.
    assert done.code in (0, 1)


def test_an_extension_that_breaks_torch_is_named_with_its_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = 'raise OSError("libvendor.so: cannot open shared object file")\n'
    install(tmp_path, "vendor-torch", "torch.backends", "vendor_torch", source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = _imports("torch")
    assert not finding.ok
    assert "libvendor.so" in finding.found
    assert "vendor-torch" in finding.fix
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in finding.fix


def test_it_does_not_crash_where_torch_cannot_be_imported(tmp_path: Path) -> None:
    install(tmp_path, "vendor-torch", "torch.backends", "vendor_torch", "raise OSError('libvendor.so')\n")
    code = "from llava_core.cli.doctor import examine; print([f.subject for f in examine() if not f.ok])"
    result = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "import torch" in result.stdout


def test_a_broken_plugin_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "vendor", "llava_core", "vendor_plugin", "import no_such_library\n")
    entry = tmp_path / "vendor-1.0.dist-info/entry_points.txt"
    entry.write_text("[llava_core]\nvendor = vendor_plugin\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    findings = {finding.subject: finding for finding in examine()}
    assert not findings["plugin vendor"].ok
    assert "no_such_library" in findings["plugin vendor"].found
    assert "vendor" in findings["plugin vendor"].fix
    assert findings["backend cpu"].ok
