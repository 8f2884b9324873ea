"""The ledger of `llava-core backends NAME --patches`: what a backend changes in libraries that are not its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from llava_core.backend import Patch


def patch_table(patch: Patch) -> Table:
    """All that is known of a patch, and its state here. Imports nothing that it patches."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=patch.name, title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    rows = {
        "target": patch.target,
        "why": patch.why,
        "source": patch.source,
        "remove when": patch.remove_when,
        "here": _state(patch),
    }
    for subject, text in rows.items():
        table.add_row(subject, escape(text))
    return table


def _state(patch: Patch) -> str:
    from llava_core.backend import No
    from llava_core.errors import PatchRefused

    try:
        verdict = patch.applies()
    except PatchRefused as reason:
        return f"refused: {reason}"
    return f"not applicable: {verdict.reason}" if isinstance(verdict, No) else "applies"
