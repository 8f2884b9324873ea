"""Runs a training step on tensors without memory.

What is on the device has none: parameters, whatever is made of them, and every tensor made anew. What the host computes
with, such as the labels of samples, was made before and has real values, so that the step's own code can decide by
them. The device is played by the host, for which PyTorch knows every operator.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed._tools.fake_collectives  # gives exchanges an implementation for tensors without memory
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llava_core.plan.collectives import CollectiveLog
from llava_core.plan.memory import EXCHANGED, GRADIENTS, MemoryLedger, resizes_counted

READ = 1.0
"""What the host reads from the device: a step asks for its loss and its norm, and any finite number will do."""

LOOK_EVERY = 64
"""Operators between two looks for new gradients, so that a layer's are known as such before the next layer's."""


class Simulation(TorchDispatchMode):
    """Within, operators give what they would, save for the values, and memory and exchanges are counted."""

    def __init__(self, ledger: MemoryLedger, log: CollectiveLog) -> None:
        super().__init__()
        self.ledger = ledger
        self.log = log
        self._without_gradient: list[nn.Parameter] = []
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._num_calls = 0

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor on the device that is not counted: what is made of it is."""
        with self._fake:
            return torch.empty(tuple(shape), dtype=dtype)

    @contextmanager
    def running(self) -> Iterator[None]:
        """The simulation, with storages that change their size counted."""
        with resizes_counted(self.ledger), self:
            yield

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it asks again for its local tensor
        if func.namespace == "prim" or not _is_on_device(types, kwargs):
            return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            return READ
        with self._fake:
            result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, FakeTensor):
                self.ledger.count(leaf)
        if func.namespace == "c10d":
            self._note(func, args)
        self._num_calls += 1
        if self._num_calls % LOOK_EVERY == 0:
            self.find_gradients()
        return result

    def expect_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Have their gradients counted as such, once they are there."""
        self._without_gradient = list(parameters)

    def find_gradients(self) -> None:
        """Look for those that came since the last look."""
        found = [parameter for parameter in self._without_gradient if parameter.grad is not None]
        if found:
            self._without_gradient = [p for p in self._without_gradient if p.grad is None]
        for parameter in found:
            assert parameter.grad is not None
            self.ledger.relabel(local(parameter.grad), GRADIENTS)

    def _note(self, func: Any, args: tuple[Any, ...]) -> None:
        kind, axis = self.log.note(func, args)
        if axis.startswith("dp_shard") and kind in ("all-gather", "reduce-scatter"):
            for leaf in tree_leaves(args):
                if isinstance(leaf, Tensor):
                    self.ledger.relabel(leaf, EXCHANGED)


def local(tensor: Tensor) -> Tensor:
    """What this process has of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _is_on_device(types: Sequence[type], kwargs: Mapping[str, Any]) -> bool:
    device = kwargs.get("device")  # of a tensor that is made anew PyTorch always gives one
    made = device is not None and device.type != "meta"
    return made or any(issubclass(kind, FakeTensor) for kind in types)
