"""Python runs this at start-up in every process under `ascend-sim run`: it puts the simulated kernels in place.

It only leaves a note to do so once torch_npu has been imported, by whomever and in whichever order, so that programs
that never import it do not notice.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import Any


class KernelInstaller(MetaPathFinder):
    """Replaces torch_npu's kernels as soon as its import ends."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != "torch_npu":
            return None
        # Programs also ask for the spec only to learn whether torch_npu is there: each answer carries the note.
        others = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(name, path, target) for finder in others if hasattr(finder, "find_spec"))
        spec = next((found for found in specs if found is not None), None)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_install(module: ModuleType) -> None:
            # torch_npu prints to stdout that it finds no CANN; where there is one, programs' output is all theirs.
            with contextlib.redirect_stdout(sys.stderr):
                execute(module)
            from ascend_simulator.install import install

            install()

        spec.loader.exec_module = execute_and_install  # type: ignore[method-assign]
        return spec


def run_hidden_sitecustomize() -> None:
    """Runs the environment's own sitecustomize, which this file hides by coming first on the path."""
    here = Path(__file__).parent
    elsewhere = [entry for entry in sys.path if Path(entry).absolute() != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", elsewhere)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


sys.meta_path.insert(0, KernelInstaller())
run_hidden_sitecustomize()
