"""Registers the backend. Imports neither torch nor the vendor's library: listings must stay quick and never crash."""

from __future__ import annotations

from llava_core.plugins import Contribution, hookimpl

WRITTEN_FOR_API = 1
"""A plain number, not llava-core's own constant: another API then refuses this package instead of running it."""


@hookimpl
def llava_register_backends() -> list[Contribution]:
    summary = "the host, through the whole interface"  # VENDOR: what it drives, in one line
    return [Contribution("template", "llava_template.backend:TemplateBackend", summary, api_version=WRITTEN_FOR_API)]
