"""Registers the cpu backend. Imports neither torch nor a vendor library."""

from __future__ import annotations

from llava_core.plugins import Contribution, hookimpl


@hookimpl
def llava_register_backends() -> list[Contribution]:
    return [Contribution("cpu", "llava_cpu.backend:CpuBackend", "any CPU that PyTorch runs on", api_version=1)]
