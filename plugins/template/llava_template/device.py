"""Memory counters and random state of the device. Here the host stands in for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from llava_core.backend import Memory, Rng

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
SYSTEM = Path("/proc/meminfo")


def read_bytes(path: Path, key: str) -> int:
    """The size behind `key` in one of Linux's tables, which count in KiB."""
    lines = path.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


class TemplateMemory(Memory):
    """What this process holds of the host's memory (proc(5))."""

    # VENDOR: your allocator's counters, e.g. torch.accelerator.max_memory_allocated() for a device that PyTorch knows.

    def peak_bytes(self) -> int:
        return read_bytes(STATUS, "VmHWM:")

    def reset_peak(self) -> None:
        CLEAR.write_text("5", encoding="ascii")

    def total_bytes(self) -> int:
        return read_bytes(SYSTEM, "MemTotal:")


class TemplateRng(Rng):
    """The host's generator; a device with a generator of its own adds it under a name of its own."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)  # VENDOR: seeds the devices that PyTorch knows; seed any other generator here

    def state(self) -> Mapping[str, torch.Tensor]:
        # VENDOR: add the device's, as uint8 on the host. Keep "host": data order and initialisation draw from it.
        return {"host": torch.get_rng_state()}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        # VENDOR: a state from other hardware has no entry for your device: then seed it with torch.initial_seed().
        torch.set_rng_state(state["host"])
