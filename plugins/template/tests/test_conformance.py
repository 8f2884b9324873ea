"""Every check of the certificate, each a test of its own: `pytest -k mask.causal` runs some."""

from __future__ import annotations

from llava_core.testing.conformance import BackendConformance


class TestTemplate(BackendConformance):
    backend = "template"
