"""Checks of what a backend patches in other libraries, each patch in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from llava_core.backend import No, Patch
from llava_core.errors import PatchRefused
from llava_core.testing.conformance.check import Check, CheckFailed, CheckSkipped
from llava_core.testing.conformance.processes import answers, start
from llava_core.testing.conformance.subject import Subject

NAME = "patches.apply_and_undo"
EXPLANATION = "a patch that applies changes its target, and undone leaves it and its class as they were"


def checks(subject: Subject) -> Iterator[Check]:
    """One check a patch; one that is skipped where there are none."""
    patches = subject.backend.patches()
    if not patches:
        yield Check(NAME, "", EXPLANATION, _skip)
    for patch in patches:
        yield Check(NAME, patch.name, EXPLANATION, partial(_check_patch, subject, patch))


def _skip() -> str:
    raise CheckSkipped("the backend patches nothing")


def _check_patch(subject: Subject, patch: Patch) -> str:
    try:
        verdict = patch.applies()
    except PatchRefused as reason:
        raise CheckSkipped(f"refused: {reason}") from reason
    if isinstance(verdict, No):
        raise CheckSkipped(verdict.reason)
    found = answers(start("patch", {"backend": subject.address, "patch": patch.name}))[0]
    if found["left"]:
        raise CheckFailed(
            f"{patch.target}: its class was not left as it was, but changed in {', '.join(found['left'])}"
        )
    if found["refused"]:
        raise CheckFailed(f"it says that it applies here, and then refuses: {found['refused']}")
    if not found["changed"]:
        raise CheckFailed(f"applying it does not change {patch.target}")
    return patch.target
