"""Recognising a function of another library: where it is defined, and what its syntax tree is."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_core.errors import PatchRefused


@dataclass(frozen=True)
class Link:
    """One function of a chain in which each wraps the next.

    Attributes:
        module: where it is defined.
        path: its name there, with those of the functions and classes around it.
        fingerprint: of its source, see `fingerprint`.
    """

    module: str
    path: str
    fingerprint: str

    @property
    def name(self) -> str:
        return f"{self.module}:{self.path.rpartition('.')[2]}"


def fingerprint(node: ast.AST) -> str:
    """A hash of a syntax tree: comments, docstrings and layout do not count, nor does Python's own version."""
    return hashlib.sha256(repr(_normalised(node)).encode()).hexdigest()[:16]


def _normalised(node: object) -> object:
    if isinstance(node, list):
        return [_normalised(item) for item in node if not _is_docstring(item)]
    if isinstance(node, ast.Constant):
        return "Constant", repr(node.value)
    if isinstance(node, ast.AST):
        # Newer Pythons add fields that are empty in older code.
        fields = [(name, _normalised(value)) for name, value in ast.iter_fields(node) if value not in (None, [])]
        return type(node).__name__, fields
    return repr(node)


def _is_docstring(node: object) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def require_chain(function: Callable[..., Any], expected: Sequence[Link]) -> None:
    """That `function` is the first of `expected`, wraps the second, and so on to the last, which wraps nothing.

    Raises:
        PatchRefused: it is not; naming what was expected and what was found.
    """
    _require_equal([_describe(f) for f in _unwrap(function)], expected)


def require_sources(expected: Sequence[Link]) -> None:
    """That the installed source of each function is the one expected. Imports nothing.

    Raises:
        PatchRefused: one is missing or another.
    """
    _require_equal([(link.name, _source_fingerprint(link)) for link in expected], expected)


def module_file(module: str) -> Path | None:
    """Where a module's source lies, found from its top package without importing that; None if it is not there."""
    top, *rest = module.split(".")
    found = importlib.util.find_spec(top)
    places = () if found is None else found.submodule_search_locations or ()
    candidates = [Path(place, *rest).with_suffix(".py") for place in places]
    return next((path for path in candidates if path.is_file()), None)


def _require_equal(found: Sequence[tuple[str, str]], expected: Sequence[Link]) -> None:
    wanted = [(link.name, link.fingerprint) for link in expected]
    if found != wanted:
        raise PatchRefused(f"expected {_chain_text(wanted)}; found {_chain_text(found)}")


def _chain_text(functions: Sequence[tuple[str, str]]) -> str:
    return " around ".join(f"{name} ({mark})" for name, mark in functions)


def _unwrap(function: Any) -> Iterator[Any]:
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


def _describe(function: Any) -> tuple[str, str]:
    """Where a function was defined (`functools.wraps` changes `__module__` and `__name__`), and its fingerprint."""
    code = getattr(function, "__code__", None)
    if code is None:
        return repr(function), "not a function"
    name = f"{function.__globals__['__name__']}:{code.co_name}"
    try:
        return name, fingerprint(ast.parse(textwrap.dedent(inspect.getsource(code))).body[0])
    except (OSError, SyntaxError):
        return name, "no source"


def _source_fingerprint(link: Link) -> str:
    path = module_file(link.module)
    if path is None:
        return "no such module"
    node: ast.AST = ast.parse(path.read_text(encoding="utf-8"))
    for name in link.path.split("."):
        inside = [n for n in ast.iter_child_nodes(node) if getattr(n, "name", None) == name]
        if not inside:
            return f"no {name}"
        node = inside[-1]
    return fingerprint(node)
