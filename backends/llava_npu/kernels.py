"""The kernels that Ascend NPUs can offer, and what each of them serves."""

from __future__ import annotations

from llava_core.backend import KernelSpec

KERNELS: tuple[KernelSpec, ...] = ()
