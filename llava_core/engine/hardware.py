"""Chooses a backend, opens its device, and settles in which dtype a run computes."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from llava_core.backend import Backend, Probe
from llava_core.errors import BackendUnavailable, ConfigError, PluginError
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


def load_backend(name: str, registry: Registry) -> type[Backend]:
    """The class behind a name, complete and of that name.

    Raises:
        PluginError: no such backend, or one that cannot be imported, or is no whole `Backend`.
    """
    kind = registry.load("backend", name)
    problem = _misfit(kind, name)
    if problem is not None:
        address = registry.offers("backend")[name].contribution.load
        raise PluginError(f"{registry.label('backend', name)}: {address} {problem}.")
    backend_class: type[Backend] = kind
    return backend_class


def _misfit(kind: Any, name: str) -> str | None:
    """What keeps an object from being the backend of that name."""
    if not (isinstance(kind, type) and issubclass(kind, Backend)):
        return f"is {kind!r}; expected a subclass of llava_core.backend.Backend"
    missing = sorted(kind.__abstractmethods__)
    missing += [attribute for attribute in ("name", "device_type") if not hasattr(kind, attribute)]
    if missing:
        return f"lacks {', '.join(missing)}; llava_core/backend/interface.py says what each must do"
    if kind.name != name:
        return f"has the name {kind.name!r}; expected the one that it is registered under, {name!r}"
    return None


@contextmanager
def vendor_code(name: str, registry: Registry, what: str) -> Iterator[None]:
    """Whatever a backend's own code raises here becomes an error that names its package.

    Raises:
        PluginError: with the traceback as its details.
    """
    try:
        yield
    except PluginError:
        raise
    except (Exception, SystemExit) as error:
        reason = f"{registry.label('backend', name)}: {what} raised {type(error).__name__}: {error}"
        raise PluginError(reason, traceback.format_exc()) from error


def probe_backend(name: str, registry: Registry) -> Probe:
    """What a backend says of this machine.

    Raises:
        PluginError: as `load_backend`, or the probe breaks its contract.
    """
    kind = load_backend(name, registry)
    with vendor_code(name, registry, "probe()"):
        found: Any = kind.probe()
        if not isinstance(found, Probe):
            raise PluginError(f"{registry.label('backend', name)}: probe() returned {found!r}; expected a Probe.")
    return found


def probe_all(registry: Registry) -> dict[str, Probe]:
    """What each registered backend says of this machine; a broken one is unavailable for that reason."""
    probes = {}
    for name in registry.names("backend"):
        try:
            probes[name] = probe_backend(name, registry)
        except PluginError as error:
            probes[name] = Probe(False, error.reason)
    return probes


def build_backend(name: str, registry: Registry) -> Backend:
    """The backend of that name, whether or not it can run here. Raises as `load_backend`."""
    kind = load_backend(name, registry)
    with vendor_code(name, registry, "its constructor"):
        backend = kind()
    missing = [part for part in ("memory", "rng") if not hasattr(backend, part)]
    if missing:
        raise PluginError(f"{registry.label('backend', name)}: its constructor sets no {' and no '.join(missing)}.")
    return backend


def choose_backend(name: str | None, registry: Registry) -> Backend:
    """The backend of that name; without one, the first by name that drives an available accelerator, else the host.

    Raises:
        PluginError: no such backend, or a broken one.
        BackendUnavailable: it cannot run here, with its reason.
    """
    if name is None:
        available = [n for n, probe in probe_all(registry).items() if probe.available]
        # Other backends may drive the host, too: none is taken that was not asked for.
        name = next((n for n in available if load_backend(n, registry).device_type != HOST), HOST)
    probe = probe_backend(name, registry)
    if not probe.available:
        raise BackendUnavailable(f"backend {name!r} cannot run here: {probe.reason}. `llava-core doctor` says more.")
    return build_backend(name, registry)


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
