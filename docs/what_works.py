"""Writes README.md's table of what works where, from the certificates beside this file.

llava-core certify --backend NAME --json docs/certificates/NAME.json
python docs/what_works.py
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llava_core.testing.conformance import Certificate, Status

DOCS = Path(__file__).resolve().parent
README = DOCS.parent / "README.md"
CERTIFICATES = DOCS / "certificates"
BEGIN, END = "<!-- from docs/what_works.py -->", "<!-- to here -->"

BACKENDS = ("cpu", "cuda", "npu")
TOPICS: Mapping[str, tuple[str, ...]] = {
    "every kernel in every dtype beside float64, forward and backward": ("kernel",),
    "attention masks, pair by pair": ("mask",),
    "arguments honoured, or refused with a reason": ("refusal",),
    "precision, random state, memory, optimizer, waits": ("device", "rng", "memory", "optimizer", "sync"),
    "plugin, probe, patches": ("plugin", "patches"),
    "sums, broadcasts and gathers of one and two processes": ("collectives",),
    "a tiny LLaVA beside the host: each layer, 20 steps, checkpoints to and fro": ("ladder",),
}
"""By what a row says, the checks that it counts: the words before the dot of their names."""

UNVERIFIED = "unverified"


def read_certificates(folder: Path) -> dict[str, Certificate | None]:
    """By backend its certificate; None where there is none."""
    files = {name: folder / f"{name}.json" for name in BACKENDS}
    return {
        name: Certificate.from_json(file.read_text(encoding="utf-8")) if file.exists() else None
        for name, file in files.items()
    }


def cell(certificate: Certificate | None, topics: tuple[str, ...]) -> str:
    """How a backend's checks of these topics ended, in a few words."""
    if certificate is None:
        return UNVERIFIED
    ends = [check.status for check in certificate.checks if check.name.partition(".")[0] in topics]
    counted = [f"{ends.count(status)} {status.value}" for status in (Status.PASSED, Status.SKIPPED) if status in ends]
    failed = ends.count(Status.FAILED)
    return ", ".join(([f"**{failed} FAILED**"] if failed else []) + counted) or UNVERIFIED


def table(certificates: Mapping[str, Certificate | None]) -> str:
    """The table in Markdown, and below it on what each column was run."""
    rows = [["`llava-core certify`", *(heading(name, found) for name, found in certificates.items())]]
    rows.append(["---"] * len(rows[0]))
    rows += [[says, *(cell(found, topics) for found in certificates.values())] for says, topics in TOPICS.items()]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", *(provenance(name, found) for name, found in certificates.items())])


def heading(name: str, certificate: Certificate | None) -> str:
    """A column's name; a simulated device is called so."""
    return f"{name}, **simulated**" if certificate is not None and "simulated" in certificate.device else name


def provenance(name: str, certificate: Certificate | None) -> str:
    """On what the checks ran."""
    if certificate is None:
        return f"- {name}: no certificate from hardware yet; `llava-core certify --backend {name}` makes one"
    versions = ", ".join(f"{library} {version}" for library, version in certificate.versions.items())
    return f"- {name}: {certificate.device}; {certificate.found}; {versions}; {certificate.date}"


def with_table(readme: str, text: str) -> str:
    """The README with the table in its place.

    Raises:
        ValueError: the marks of its place are not there.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no place for the table: {BEGIN} … {END}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def main() -> None:
    """Rewrites README.md."""
    text = table(read_certificates(CERTIFICATES))
    README.write_text(with_table(README.read_text(encoding="utf-8"), text), encoding="utf-8")


if __name__ == "__main__":
    main()
