"""Patch records: what a backend changes in a library that is not its own, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from llava_core.backend.kernels import Verdict

Undo: TypeAlias = Callable[[], None]


@dataclass(frozen=True)
class Patch:
    """One change to one attribute of another library, made in memory and undone.

    Attributes:
        name: unique within the backend.
        target: the attribute that is replaced, `package.module:Class.attribute`.
        why: what goes wrong without it.
        source: the versions it was written and verified against.
        remove_when: what must become true for it to be no longer needed.
        library: the module whose import makes the target what the patch expects. Whoever runs the library imports
            it, in a process of its own if it changes more than its own target.
        applies: whether there is anything to patch here, from what is installed; imports no library.
            Raises `PatchRefused` if what is installed is not what the patch was written for.
        apply: makes the change, in a process where `library` was imported, and returns what undoes it.
            Raises `PatchRefused`, with nothing changed, if the target is not what the patch was written for.
    """

    name: str
    target: str
    why: str
    source: str
    remove_when: str
    library: str
    applies: Callable[[], Verdict]
    apply: Callable[[], Undo]
