"""What a layer keeps between its forward and its backward pass.

PyTorch keeps each tensor that a backward pass will read. Here a layer may keep less: what a step of it makes, a norm
say, is kept by nobody, neither inside of the step nor where its result is used; only its arguments are, and from these
it is done once more when the backward pass first asks. And what is kept may be put elsewhere.

It works on the tensors that autograd saves, so it holds for every kernel, shard and exchange alike, and the backward
pass reads the same bits. Whatever an operation keeps in another way than autograd's is not seen, and stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

Step = Callable[..., Tensor]

Store = Callable[[Tensor], Callable[[], Tensor]]
"""Puts a tensor elsewhere, and returns what brings it back."""

MIN_MOVED_BYTES = 4096
"""Smaller tensors stay: the statistics of rows, say, are many, and cost more to move than to keep."""


class Recall:
    """Tensors that are made again when the first of those that wait for them asks, and let go after the last."""

    def __init__(self, make: Callable[[], Sequence[Tensor]]) -> None:
        self._make = make
        self._waiting = 0
        self._made: Sequence[Tensor] | None = None

    def promise(self) -> None:
        """One more will ask."""
        self._waiting += 1

    def take(self) -> Sequence[Tensor]:
        made = self._make() if self._made is None else self._made
        self._waiting -= 1
        self._made = made if self._waiting else None
        return made


@dataclass(frozen=True)
class Promise:
    """A tensor that autograd wanted to save: a view, of this geometry, of one that can be recalled."""

    recall: Recall
    index: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def fulfil(self) -> Tensor:
        return self.recall.take()[self.index].as_strided(self.size, self.stride, self.offset)


@dataclass(frozen=True)
class _Source:
    """Where a storage's values can be had from. The tensor keeps its address from being given to another one."""

    tensor: Tensor
    version: int
    recall: Recall
    index: int


class LayerMemory:
    """Decides what one layer keeps, while its forward pass runs.

    Args:
        store: where kept activations go; None leaves them where they are.
    """

    def __init__(self, store: Store | None) -> None:
        self._store = store
        self._sources: dict[int, _Source] | None = None
        self._staying: frozenset[int] = frozenset()

    @contextmanager
    def keeping(self, staying: Iterable[Tensor]) -> Iterator[None]:
        """Within, one forward pass runs.

        Args:
            staying: what is there after the pass anyhow, such as weights, and is never put elsewhere.
        """
        self._sources, self._staying = {}, frozenset(map(_address, staying))
        try:
            with saved_tensors_hooks(self._pack, _unpack):
                yield
        finally:
            self._sources = None

    def forgetting(self, step: Step) -> Step:
        """The same function of tensors; within `keeping`, what it makes is made again for the backward pass."""

        def forgotten(*arguments: Any) -> Tensor:
            return step(*arguments) if self._sources is None else self._forget(step, arguments)

        return forgotten

    def _forget(self, step: Step, arguments: tuple[Any, ...]) -> Tensor:
        kept = [self._keep(x) if isinstance(x, Tensor) else x for x in arguments]
        recall = Recall(lambda: _redone(step, kept))
        count = 0

        def pack(_: Tensor) -> Promise | int:
            nonlocal count
            recall.promise()
            count += 1
            return count - 1

        with saved_tensors_hooks(pack, lambda index: recall.take()[index]):
            result = step(*arguments)
        if all(_address(result) != _address(x) for x in arguments if isinstance(x, Tensor)):
            self._remember(result, recall, -1)
        return result

    def _keep(self, argument: Tensor) -> Callable[[], Tensor]:
        """What brings an argument back as the leaf of a graph of its own."""
        packed, needs_grad = self._pack(argument.detach()), argument.requires_grad
        return lambda: _unpack(packed).detach().requires_grad_(needs_grad)

    def _remember(self, tensor: Tensor, recall: Recall, index: int) -> None:
        assert self._sources is not None
        self._sources[_address(tensor)] = _Source(tensor, tensor._version, recall, index)

    def _pack(self, tensor: Tensor) -> Tensor | Promise:
        assert self._sources is not None, "a saved tensor is packed while the forward pass runs"
        address = _address(tensor)
        if not address:
            return tensor  # it has no values
        source = self._sources.get(address)
        if source is None and self._store is not None and self._moves(tensor, address):
            whole = tensor.detach().as_strided((_length(tensor),), (1,), 0)
            back = self._store(whole)
            self._remember(whole, Recall(lambda: (back(),)), 0)
            source = self._sources[address]
        if source is None or source.tensor.dtype != tensor.dtype or source.tensor._version != source.version:
            return tensor
        source.recall.promise()
        return Promise(source.recall, source.index, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def _moves(self, tensor: Tensor, address: int) -> bool:
        # Of other types are masks and indices, which layers share.
        large = tensor.is_floating_point() and tensor.untyped_storage().nbytes() >= MIN_MOVED_BYTES
        return large and address not in self._staying


def _redone(step: Step, kept: Sequence[Any]) -> list[Tensor]:
    """What autograd saves while a step is done once more, in order, and at last its result."""
    saved: list[Tensor] = []
    arguments = [x() if callable(x) else x for x in kept]
    # Without their graph, which holds on to the list by this very hook.
    with torch.enable_grad(), saved_tensors_hooks(lambda tensor: saved.append(tensor.detach()), _refuse):
        result = step(*arguments)
    return [*saved, result.detach()]


def _unpack(packed: Tensor | Promise) -> Tensor:
    return packed.fulfil() if isinstance(packed, Promise) else packed


def _refuse(_: object) -> Tensor:
    raise AssertionError("nothing is differentiated through what is done again")


def _address(tensor: Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    storage = local.untyped_storage()
    # The storage's own, not its memory's: in a plan no tensor has memory. There is no public name for it.
    return storage._cdata if storage.nbytes() else 0


def _length(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes() // tensor.element_size()
