"""Registers the cuda backend. Imports neither torch nor a vendor library."""

from __future__ import annotations

from llava_core.plugins import Contribution, hookimpl


@hookimpl
def llava_register_backends() -> list[Contribution]:
    return [Contribution("cuda", "llava_cuda.backend:CudaBackend", "NVIDIA GPUs through PyTorch CUDA", api_version=1)]
