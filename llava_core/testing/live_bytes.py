"""Counts the memory that a piece of work holds, as it runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Within, the bytes of tensors that operations make and that are still alive. What an operation itself takes and
    gives back while it runs is not seen, nor are tensors from before; so the count is the same each time.

    Attributes:
        now: bytes that are alive.
        peak: the most there were.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._device_type = device_type
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_storage(x)._cdata for x in _tensors((*args, *(kwargs or {}).values()))}
        for tensor in _tensors((result,)):
            storage = _storage(tensor)
            if tensor.device.type == self._device_type and storage._cdata not in given | self._known:
                self._begin(storage)
        return result

    def _begin(self, storage: torch.UntypedStorage) -> None:
        size, key = storage.nbytes(), storage._cdata
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._end, key, size)

    def _end(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
