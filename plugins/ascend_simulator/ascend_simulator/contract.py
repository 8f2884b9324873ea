"""How a broken contract is reported, and what every kernel of the device refuses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

# The chips that do not know bfloat16, by the beginning of their names.
CHIPS_WITHOUT_BF16 = ("Ascend910A", "Ascend910Pro", "Ascend910Premium", "Ascend310")

# They store, move and convert, which a device does for every dtype.
STORING = frozenset(("_local_scalar_dense", "_to_copy", "clone", "copy_", "equal", "fill_", "zero_", "zeros"))
# What printing a tensor takes: torch looks for the digits to show in float64.
INSPECTING = frozenset(
    ("abs", "ceil", "div", "eq", "ge", "gt", "isfinite", "le", "lt", "masked_select", "max", "min", "ne")
)
# The first generation, whose list of products these ops' documentation does not name (npu_rotary_mul: with compiled
# kernels only). A backward op goes by the name of its forward.
OLD_CHIPS = ("Ascend910A", "Ascend910Pro", "Ascend910Premium")
NOT_ON_OLD_CHIPS = ("npu_cross_entropy_loss", "npu_fusion_attention", "npu_rotary_mul", "npu_swiglu")


class ContractError(RuntimeError):
    """A call that the documentation does not allow: a real device gives an error, or an unspecified result."""


def require(condition: bool, op: str, rule: str, found: object) -> None:
    """Raises `ContractError` that names the op, the rule as documented, and what was found."""
    if not condition:
        raise ContractError(f"{op}: {rule}; found {found}")


def require_dtype(op: str, name: str, tensor: Tensor, allowed: Iterable[torch.dtype]) -> None:
    """Raises unless the tensor has one of the dtypes."""
    allowed = tuple(allowed)
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
    require(tensor.dtype in allowed, op, f"{name} is {names}", str(tensor.dtype).removeprefix("torch."))


HALF_AND_FLOAT = (torch.float16, torch.bfloat16, torch.float32)


def check_chip(op: str, soc_name: str) -> None:
    """Raises if the op is not documented for the chip."""
    missing = op.startswith(NOT_ON_OLD_CHIPS) and soc_name.startswith(OLD_CHIPS)
    require(not missing, op, "documented for Atlas A2 (910B) and later", soc_name)


def check_dtypes(op: str, values: Iterable[Any], soc_name: str) -> None:
    """Raises if a kernel that computes is given a dtype that the chip does not compute in."""
    if op in STORING:
        return
    may_be_double = op in INSPECTING
    no_bf16 = soc_name.startswith(CHIPS_WITHOUT_BF16)
    for tensor in tensors_of(values):
        require(
            may_be_double or tensor.dtype != torch.float64, op, "NPUs do not compute in float64", "a float64 tensor"
        )
        if no_bf16:
            require(tensor.dtype != torch.bfloat16, op, f"{soc_name} has no bfloat16", "a bfloat16 tensor")


def tensors_of(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among arguments, and in lists among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_of(value)
