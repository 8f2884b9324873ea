"""All checks of a backend, the choice among them, and the certificate that they add up to."""

from __future__ import annotations

import difflib
import platform
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from importlib import metadata

import torch

from llava_core.backend import CATALOGUE, Backend
from llava_core.engine.hardware import HOST
from llava_core.errors import BackendUnavailable, ConfigError
from llava_core.plugins import Registry
from llava_core.plugins.hookspecs import GROUP
from llava_core.testing.conformance import hardware, kernels, ladder, masks, patching, processes, refusal
from llava_core.testing.conformance.check import Check, CheckSkipped, run_check
from llava_core.testing.conformance.result import Certificate, Result
from llava_core.testing.conformance.subject import Subject

TOPICS = (kernels, masks, refusal, hardware, processes, patching, ladder)


def build_subject(backend: Backend, registry: Registry) -> Subject:
    """The backend to be certified, beside the host's. Opens nothing."""
    offer = registry.offers("backend").get(backend.name)
    modules = {entry.name: entry.value for entry in metadata.entry_points(group=GROUP)}
    module = modules.get(offer.plugin) if offer is not None else None
    host: Backend = registry.load("backend", HOST)()
    return Subject(backend, host, module)


def all_checks(subject: Subject) -> list[Check]:
    """Every check, in the order in which it is run."""
    return [check for topic in TOPICS for check in topic.checks(subject)]


def select_checks(checks: Iterable[Check], op: str | None = None, case: str | None = None) -> list[Check]:
    """The checks of one op, of one case, or both; all without either.

    Raises:
        ConfigError: no such op or case; naming the nearest.
    """
    if op is not None and op not in CATALOGUE:
        raise ConfigError(_unknown("op", op, list(CATALOGUE)))
    ops = CATALOGUE if op is None else {op: CATALOGUE[op]}
    cases = sorted({c.name for one in ops.values() for c in one.cases})
    if case is not None and case not in cases:
        raise ConfigError(_unknown("case" if op is None else f"case of {op}", case, cases))
    return [c for c in checks if (op is None or c.op == op) and (case is None or c.case == case)]


def certify(
    subject: Subject, checks: Sequence[Check], on_result: Callable[[Result], None] = lambda _: None
) -> Certificate:
    """Run the checks one after the other; `on_result` hears of each as it ends.

    Raises:
        BackendUnavailable: the backend cannot run here.
    """
    try:
        device = subject.hardware.device_name
    except CheckSkipped as reason:
        raise BackendUnavailable(str(reason)) from reason
    results = []
    for check in checks:
        results.append(run_check(check))
        on_result(results[-1])
    found, date = type(subject.backend).probe().reason, datetime.now(timezone.utc).date().isoformat()
    return Certificate(subject.backend.name, device, found, date, _versions(), tuple(results))


def _versions() -> dict[str, str]:
    core = metadata.version("llava-core")
    return {"llava-core": core, "torch": str(torch.__version__), "python": platform.python_version()}


def _unknown(kind: str, name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {name!r}; there are: {', '.join(known)}.{hint}"
