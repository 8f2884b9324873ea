"""Registers the npu backend. Imports neither torch nor a vendor library."""

from __future__ import annotations

from llava_core.plugins import Contribution, hookimpl


@hookimpl
def llava_register_backends() -> list[Contribution]:
    return [Contribution("npu", "llava_npu.backend:NpuBackend", "Huawei Ascend NPUs through torch_npu", api_version=1)]
