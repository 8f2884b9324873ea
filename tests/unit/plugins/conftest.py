"""Installs made-up plugins."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a distribution with one module and one entry point on the path, as an installer would leave it."""
    monkeypatch.syspath_prepend(tmp_path)
    modules: list[str] = []

    def put(name: str, source: str, *, version: str = "1.0") -> None:
        module = f"dummy_{name}_plugin"
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"dummy_{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: dummy-{name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[llava_core]\n{name} = {module}\n")
        modules.append(module)
        importlib.invalidate_caches()

    yield put
    for module in modules:
        sys.modules.pop(module, None)
