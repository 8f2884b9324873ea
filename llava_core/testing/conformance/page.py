"""A certificate as one HTML file that refers to no other."""

from __future__ import annotations

from html import escape

from llava_core.testing.conformance.result import Certificate, Result, Status
from llava_core.testing.conformance.summary import Line, heading, skips, summarise, verdict

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem; border-bottom: 1px solid #ddd }
td.number { text-align: right }
code { font-size: 13px }
pre { background: #f6f6f6; padding: .6rem; overflow-x: auto; white-space: pre-wrap }
.passed { color: #176b2c } .failed { color: #b3261e; font-weight: bold } .skipped { color: #8a6100 }
"""


def render_page(certificate: Certificate) -> str:
    """The whole page: verdict, a row a check's name, reasons for skips, every failure, then every check."""
    title = escape(f"{certificate.backend} on {certificate.device}")
    status = Status.PASSED if certificate.ok else Status.FAILED
    return "".join(
        [
            f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
            f"<style>{STYLE}</style></head><body>\n<h1>{title}</h1>\n",
            f'<p class="{status.value}">{escape(verdict(certificate))}</p>\n<p>{escape(heading(certificate))}</p>\n',
            _summary(summarise(certificate)),
            _skips(skips(certificate)),
            _failures(certificate.failures()),
            _every(certificate),
            "</body></html>\n",
        ]
    )


def _table(head: list[str], rows: list[str]) -> str:
    header = "".join(f"<th>{word}</th>" for word in head)
    return f"<table>\n<tr>{header}</tr>\n" + "".join(f"<tr>{row}</tr>\n" for row in rows) + "</table>\n"


def _word(status: Status) -> str:
    return f'<td class="{status.value}">{status.value}</td>'


def _summary(lines: list[Line]) -> str:
    rows = [
        f"<td><code>{escape(line.name)}</code></td>{_word(line.status)}"
        + "".join(f'<td class="number">{line.counts[status] or ""}</td>' for status in Status)
        + f"<td>{escape(line.explanation)}</td><td>{escape(line.found)}</td>"
        for line in lines
    ]
    return _table(["check", "", "passed", "failed", "skipped", "a pass means", "found"], rows)


def _skips(lines: list[tuple[str, str]]) -> str:
    rows = [f"<td>{escape(subjects)}</td><td>{escape(reason)}</td>" for subjects, reason in lines]
    return "<h2>Skipped</h2>\n" + _table(["what", "why"], rows) if rows else ""


def _failures(failures: list[Result]) -> str:
    shown = [f"<h3><code>{escape(f.id)}</code></h3><pre>{escape(f.message)}</pre>\n" for f in failures]
    return "<h2>Failures</h2>\n" + "".join(shown) if shown else ""


def _every(certificate: Certificate) -> str:
    rows = [
        f"<td><code>{escape(check.id)}</code></td>{_word(check.status)}<td>{escape(check.message)}</td>"
        for check in certificate.checks
    ]
    return f"<details><summary>every check</summary>\n{_table(['check', '', 'message'], rows)}</details>\n"
