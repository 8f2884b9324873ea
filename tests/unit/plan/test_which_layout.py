"""The page's table of layouts is the plans' own word."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def which_layout() -> ModuleType:
    spec = importlib.util.spec_from_file_location("which_layout", ROOT / "docs" / "which_layout.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["which_layout"] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def rows_of_the_page(which_layout: ModuleType) -> list[tuple[str, ...]]:
    _, _, rest = which_layout.PAGE.read_text(encoding="utf-8").partition(which_layout.BEGIN)
    lines = rest.partition(which_layout.END)[0].strip().splitlines()
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]


def test_the_page_has_a_row_for_each(which_layout: ModuleType) -> None:
    headings, _, *rows = rows_of_the_page(which_layout)
    assert headings == which_layout.HEADINGS
    assert [row[:4] for row in rows] == [row.subject_cells() for row in which_layout.ROWS]


@pytest.mark.slow
def test_a_row_is_what_its_plan_says(which_layout: ModuleType) -> None:
    index = 1  # in which two plans already tell that nothing fits
    row = which_layout.ROWS[index]
    assert rows_of_the_page(which_layout)[2 + index] == row.cells(row.plan())
