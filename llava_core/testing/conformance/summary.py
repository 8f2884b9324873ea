"""A certificate in short: a line a check's name, and skips by reason. What the renderings share."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from llava_core.testing.conformance.result import Certificate, Result, Status


@dataclass(frozen=True)
class Line:
    """All checks of one name.

    Attributes:
        found: what was measured, where there is one check of the name and it passed.
    """

    name: str
    explanation: str
    counts: Counter[Status]
    found: str

    @property
    def status(self) -> Status:
        """Failed if one is, passed if one is, else skipped."""
        return next(s for s in (Status.FAILED, Status.PASSED, Status.SKIPPED) if self.counts[s])


def heading(certificate: Certificate) -> str:
    """Of what it is: backend, device, day, what the probe found, versions."""
    versions = (f"{name} {version}" for name, version in certificate.versions.items())
    told = ", ".join((certificate.date, certificate.found, *versions))
    return f"{certificate.backend} on {certificate.device} ({told})"


def summarise(certificate: Certificate) -> list[Line]:
    """The lines, in the order in which the checks ran."""
    groups: dict[str, list[Result]] = {}
    for check in certificate.checks:
        groups.setdefault(check.name, []).append(check)
    return [_line(name, group) for name, group in groups.items()]


def _line(name: str, group: list[Result]) -> Line:
    found = group[0].message if len(group) == 1 and group[0].status is Status.PASSED else ""
    return Line(name, group[0].explanation, Counter(check.status for check in group), found)


def skips(certificate: Certificate) -> list[tuple[str, str]]:
    """For each reason to skip, the kernels or else the checks that it kept from being judged, and how many checks."""
    groups: dict[str, list[Result]] = {}
    for check in certificate.checks:
        if check.status is Status.SKIPPED:
            groups.setdefault(check.message, []).append(check)
    lines = []
    for reason, group in groups.items():
        subjects = dict.fromkeys("/".join(c.target.split("/")[:2]) if "/" in c.target else c.name for c in group)
        lines.append((f"{', '.join(subjects)} ({len(group)} skipped)", reason))
    return lines


def verdict(certificate: Certificate) -> str:
    """One sentence."""
    counts = ", ".join(f"{certificate.count(status)} {status.value}" for status in Status)
    if certificate.ok:
        return f"{certificate.backend} conforms: {counts}"
    return f"{certificate.backend} does not conform: {counts}"
