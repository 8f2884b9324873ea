"""Random numbers of the device: drawn on the host, but from the device generator's seed and offset.

So that seeding, saving and restoring the device's random state have the effect that they have on a device. The
numbers themselves are not an NPU's.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Backward passes run in a thread of their own, and the host's generator is lent to one kernel at a time.
_host_generator_lent = threading.RLock()

# The generator counts in fours.
OFFSET_STEP = 4


@contextmanager
def device_random_state(generator: torch.Generator) -> Iterator[None]:
    """While it lasts, the host's default generator stands where `generator` does; afterwards that has moved on."""
    state = generator.get_state()
    words = state.view(torch.int64)  # seed, offset
    with _host_generator_lent:
        host = torch.default_generator
        saved = host.get_state()
        # Any mixture in which neighbouring seeds and offsets give unrelated streams.
        host.manual_seed((int(words[0]) * 0x9E3779B97F4A7C15 + int(words[1]) * 0xD1B54A32D192ED03) % (1 << 63))
        try:
            yield
        finally:
            host.set_state(saved)
    words[1] += OFFSET_STEP
    generator.set_state(state)
