"""Replaces torch_npu's kernels by host kernels over device memory. Everything above the kernels stays torch_npu's."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ascend_simulator.environment import SOC_NAME, SOCS
from ascend_simulator.kernels import Op, build_kernel, is_view
from ascend_simulator.overrides import install_overrides
from ascend_simulator.reference import REFERENCES

KEY = "PrivateUse1"

# torch_npu's own code runs for these, by the beginning of their names: it works on host memory as it is (allocation,
# storage, streams), or it is out of scope and must fail by name rather than be computed in some other way.
KEPT = (
    # Allocation and storage.
    "empty",
    "new_empty",
    "resize_",
    "set_",
    "as_strided_",
    "copy_memory_",
    "_copy_from_and_resize",
    "_lazy_clone",
    # Streams and page-locked memory.
    "record_stream",
    "is_pinned",
    "_pin_memory",
    # Out of scope.
    "_backward",
    "_has_",
    "_make",
    "_nested",
    "_sparse",
    "sparse",
    "to_sparse",
    "_to_sparse",
    "quantize",
    "_quantize",
)

# Registrations are undone when the library object that made them is collected.
_installed: list[torch.library.Library] = []


def install() -> int:
    """Puts every kernel in place, once for a process, and returns how many there are. Initialises no device."""
    if _installed:
        return 0
    soc_name = os.environ.get(SOC_NAME, SOCS["910B"])
    aten, npu = torch.library.Library("aten", "IMPL"), torch.library.Library("npu", "IMPL")
    _installed.extend((aten, npu))
    count = 0
    with warnings.catch_warnings():
        # torch warns once for each kernel that is registered a second time: that is the point here.
        warnings.simplefilter("ignore", UserWarning)
        for name, op in replaceable_aten_ops():
            aten.impl(name, build_kernel(op, op, soc_name), KEY, allow_override=True)
            count += 1
        for name, function in REFERENCES.items():
            npu.impl(name, build_kernel(_overload("npu", name), function, soc_name), KEY, allow_override=True)
            count += 1
        install_overrides(aten, soc_name)
    return count


def replaceable_aten_ops() -> Iterator[tuple[str, Op]]:
    """torch's own ops for which torch_npu registers a kernel that computes."""
    for qualified in torch._C._dispatch_get_registrations_for_dispatch_key(KEY):
        namespace, _, name = qualified.partition("::")
        if namespace != "aten" or name.startswith(KEPT):
            continue
        # torch_npu declares ops of its own in the same namespace; they have no host kernel.
        op = _overload("aten", name)
        if op is not None and not is_view(op):
            yield name, op


def _overload(namespace: str, name: str) -> Any:
    base, _, overload = name.partition(".")
    packet: Callable[..., Any] | None = getattr(getattr(torch.ops, namespace), base, None)
    return getattr(packet, overload or "default", None)
