"""A world of processes of which there is only one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore  # also registers the group; there is no public way

from llava_core.engine.processes import Processes
from llava_core.errors import ConfigError


@contextmanager
def pretended(rank: int, size: int) -> Iterator[Processes]:
    """Within, this process takes itself for `rank` of `size`, and whatever it tells the others is lost.

    Raises:
        ConfigError: there is no such rank.
    """
    if not 0 <= rank < size:
        raise ConfigError(f"rank {rank} of {size} processes: expected one from 0 to {size - 1}.")
    if size == 1:
        yield Processes()
        return
    assert not distributed.is_initialized(), "this process has real peers"
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield Processes(rank, size, rank, size)
    finally:
        distributed.destroy_process_group()
