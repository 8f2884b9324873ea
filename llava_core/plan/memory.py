"""What memory would be in use if tensors had any: every storage is counted while something still refers to it."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

WEIGHTS, GRADIENTS, OPTIMIZER = "weights", "gradients", "optimizer"
EXCHANGED = "weights and gradients in exchange"
ACTIVATIONS, LOSS = "activations", "logits and loss"
KINDS = (WEIGHTS, GRADIENTS, OPTIMIZER, EXCHANGED, ACTIVATIONS, LOSS)
"""What memory is used for, in the order in which it is shown."""


class MemoryLedger:
    """Bytes in use by kind, and the most that there were.

    Attributes:
        kind: of what is counted from now on.
        live: bytes by kind.
        total: of all kinds.
        peak: the largest total since `start_peak`.
        at_peak: `live` at that moment.
        largest: the most of each kind since `start_peak`, whenever that was.
    """

    def __init__(self) -> None:
        self.kind = ACTIVATIONS
        self.live: Counter[str] = Counter()
        self.total = 0
        self._held: dict[int, tuple[weakref.ref[torch.UntypedStorage], str, int]] = {}
        self.start_peak()

    def start_peak(self) -> None:
        """Measure the peak from now on."""
        self.peak, self.at_peak, self.largest = self.total, Counter(self.live), Counter(self.live)

    def count(self, tensor: Tensor) -> None:
        """A tensor exists; a view of what is counted already changes nothing."""
        storage = tensor.untyped_storage()
        if id(storage) not in self._held:
            self._hold(storage, self.kind, storage.nbytes())

    def relabel(self, tensor: Tensor, kind: str) -> None:
        """Its memory is of this kind, as it turns out."""
        self._change(tensor.untyped_storage(), kind, None)

    def resized(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        """Its memory was taken or given back. Sharding alone does so, with weights that it gathers and frees."""
        self._change(storage, EXCHANGED, num_bytes)

    @contextmanager
    def counting(self, kind: str) -> Iterator[None]:
        """What is made within is of this kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def _hold(self, storage: torch.UntypedStorage, kind: str, num_bytes: int) -> None:
        # A storage's object lives as long as any tensor on it, even one that only autograd still has.
        key = id(storage)
        self._held[key] = weakref.ref(storage, lambda _: self._release(key)), kind, num_bytes
        self._add(kind, num_bytes)

    def _change(self, storage: torch.UntypedStorage, kind: str, num_bytes: int | None) -> None:
        held = self._held.get(id(storage))
        if held is None:
            return  # not memory of the device: the host's own
        reference, before, size = held
        after = size if num_bytes is None else num_bytes
        self._held[id(storage)] = reference, kind, after
        self._add(before, -size)
        self._add(kind, after)

    def _release(self, key: int) -> None:
        _, kind, num_bytes = self._held.pop(key)
        self._add(kind, -num_bytes)

    def _add(self, kind: str, num_bytes: int) -> None:
        self.live[kind] += num_bytes
        self.total += num_bytes
        if num_bytes > 0:
            self.largest[kind] = max(self.largest[kind], self.live[kind])
            if self.total > self.peak:
                self.peak, self.at_peak = self.total, Counter(self.live)


@contextmanager
def resizes_counted(ledger: MemoryLedger) -> Iterator[None]:
    """Within, storages that change their size are counted.

    FSDP2 frees what it has gathered so, and no dispatch mode sees it; torch's own memory tracker replaces the method,
    too (torch/distributed/_tools/mem_tracker.py).
    """
    resize: Callable[..., Any] = torch.UntypedStorage.resize_

    def counted(storage: torch.UntypedStorage, size: int) -> Any:
        resized = resize(storage, size)
        ledger.resized(storage, size)
        return resized

    torch.UntypedStorage.resize_ = counted  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
