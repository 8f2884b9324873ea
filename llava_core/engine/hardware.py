"""Chooses a backend, opens its device, and settles in which dtype a run computes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from llava_core.backend import Backend, Probe
from llava_core.errors import BackendUnavailable, ConfigError
from llava_core.plugins import Registry

HOST = "cpu"
"""The backend that is taken where no accelerator is available."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Hardware:
    """An opened device."""

    backend: Backend
    device: torch.device

    @cached_property
    def device_name(self) -> str:
        """The device as a person would call it."""
        devices = type(self.backend).probe().devices
        index = self.device.index or 0
        return devices[index].name if index < len(devices) else str(self.device)


def probe_all(registry: Registry) -> dict[str, Probe]:
    """What each registered backend says of this machine; one that cannot be imported is unavailable for that reason."""
    probes = {}
    for name in registry.names("backend"):
        try:
            probes[name] = registry.load("backend", name).probe()
        except Exception as error:  # the plugin boundary: a broken backend is unavailable, with its reason
            probes[name] = Probe(False, str(error))
    return probes


def choose_backend(name: str | None, registry: Registry) -> Backend:
    """The backend of that name; without one, the first available accelerator, else the host.

    Raises:
        PluginError: no such backend, or one that cannot be imported.
        BackendUnavailable: it cannot run here, with its reason.
    """
    if name is None:
        available = [n for n, probe in probe_all(registry).items() if probe.available]
        name = next((n for n in available if n != HOST), HOST)
    backend_class: Any = registry.load("backend", name)
    probe = backend_class.probe()
    if not probe.available:
        raise BackendUnavailable(f"backend {name!r} cannot run here: {probe.reason}. `llava-core doctor` says more.")
    backend: Backend = backend_class()
    return backend


def open_hardware(
    name: str | None,
    registry: Registry,
    *,
    threads: int | None = None,
    deterministic: bool = False,
    local_rank: int = 0,
) -> Hardware:
    """The chosen backend with its device opened. Raises as `choose_backend`."""
    backend = choose_backend(name, registry)
    return Hardware(backend, backend.open(local_rank, threads=threads, deterministic=deterministic))


def compute_dtype(precision: str, backend: Backend) -> torch.dtype:
    """The dtype of `auto`, `bf16`, `fp16` or `fp32` on this hardware.

    Raises:
        ConfigError: the hardware does not compute in it.
    """
    caps = backend.precision
    if precision == "auto":
        return caps.default
    if precision not in DTYPES:
        raise ConfigError(f"precision {precision!r}: expected one of auto, {', '.join(DTYPES)}.")
    if DTYPES[precision] not in caps.compute:
        able = [name for name, dtype in DTYPES.items() if dtype in caps.compute]
        raise ConfigError(f"precision {precision}: backend {backend.name!r} computes in {', '.join(able)}; choose one.")
    return DTYPES[precision]
