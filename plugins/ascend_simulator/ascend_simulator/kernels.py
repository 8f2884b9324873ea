"""Turns a function over host tensors into a kernel for device tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ascend_simulator.aliasing import device_of, on_device, on_host
from ascend_simulator.contract import check_chip, check_dtypes
from ascend_simulator.random_state import device_random_state

Op = Any  # torch._ops.OpOverload, which has no public type


def build_kernel(op: Op, function: Callable[..., Any], soc_name: str) -> Callable[..., Any]:
    """A kernel for `op` that calls `function` with each device tensor as a host tensor over the same memory.

    `function` takes the op's arguments and returns its results; what the op's schema says it writes, it must write in
    place.
    """
    schema, base = op._schema, op._schema.name.partition("::")[2]
    names = [argument.name for argument in schema.arguments]
    written = [_written_argument(schema, result) for result in schema.returns]
    is_random = torch.Tag.nondeterministic_seeded in op.tags

    def kernel(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        # Collectives are launched from torch_npu's task queue; what they write must be there before it is read.
        torch.npu.synchronize()  # type: ignore[attr-defined]
        check_chip(base, soc_name)
        check_dtypes(base, given.values(), soc_name)
        device = device_of(given.values())
        with _random_state(given.values(), device) if is_random else nullcontext():
            result = function(*on_host(args), **{name: on_host(value) for name, value in kwargs.items()})
        if not schema.returns:
            return None
        results = (result,) if len(schema.returns) == 1 else result
        returned = [
            given[name] if name else on_device(value, device) for name, value in zip(written, results, strict=True)
        ]
        check_dtypes(base, returned, soc_name)
        return returned[0] if len(returned) == 1 else tuple(returned)

    return kernel


def _written_argument(schema: Any, result: Any) -> str | None:
    """The argument that is written and returned as this result, if any."""
    if result.alias_info is None or not result.alias_info.is_write:
        return None
    return next(
        argument.name
        for argument in schema.arguments
        if argument.alias_info is not None and argument.alias_info.before_set == result.alias_info.before_set
    )


def _random_state(values: Iterable[Any], device: torch.device) -> AbstractContextManager[None]:
    """The state in which a random kernel draws: of the generator it is given, else of its device's own."""
    for value in values:
        if isinstance(value, torch.Generator):
            return device_random_state(value) if value.device.type == device.type else nullcontext()
    if device.type == "cpu":
        return nullcontext()
    return device_random_state(torch.npu.default_generators[device.index])  # type: ignore[attr-defined]


def is_view(op: Op) -> bool:
    """Whether a result shares memory with an argument without being written: such ops are no kernels."""
    return any(result.alias_info is not None and not result.alias_info.is_write for result in op._schema.returns)
