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
        source: the versions it was written for and verified against.
        remove_when: what must become true for it to be no longer needed.
        applies: whether there is anything to patch here, from what is installed; imports no library.
            Raises `PatchRefused` if what is installed is not what the patch was written for.
        load: loads the library as the patch expects it. May change more of the process than the target, so it is
            called in a process of its own, whose device is open. An engine with settings of its own loads it itself.
        apply: makes the change, after the library was loaded, and returns what undoes it.
            Raises `PatchRefused`, with nothing changed, if the target is not what the patch was written for.
    """

    name: str
    target: str
    why: str
    source: str
    remove_when: str
    applies: Callable[[], Verdict]
    load: Callable[[], None]
    apply: Callable[[], Undo]
