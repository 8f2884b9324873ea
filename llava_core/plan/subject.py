"""What a plan is made for: a config, a model's numbers and a kind of hardware."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llava_core.backend import Backend, DeviceInfo
from llava_core.config import RunConfig, build_config, merge
from llava_core.engine.hardware import (
    DTYPES,
    HOST,
    Hardware,
    build_backend,
    choose_backend,
    compute_dtype,
    probe_backend,
)
from llava_core.engine.layout import Layout
from llava_core.engine.tensor import check_tensor
from llava_core.errors import ConfigError
from llava_core.model.adapters import Adapters
from llava_core.model.spec import ModelSpec
from llava_core.plugins import Registry
from llava_core.train.checks import (
    check_backend,
    check_data_settings,
    check_recompute,
    check_shares,
    check_trainable,
    moved_to_host,
)
from llava_core.train.chosen_model import open_spec
from llava_core.train.lora import adapters_of, check_lora
from llava_core.train.stages import pipeline_stages

NO_DATA = "(no data)"
"""Stands for `data.path`, which a plan does not read."""

UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@dataclass(frozen=True)
class Subject:
    """What is planned.

    Attributes:
        dtype: of the activations.
        devices: those of the backend on this machine; empty where it is not here.
    """

    config: RunConfig
    spec: ModelSpec
    backend: Backend
    dtype: torch.dtype
    devices: tuple[DeviceInfo, ...]

    @classmethod
    def of(cls, config: RunConfig, registry: Registry) -> Subject:
        """The config with the model that it names, of which only the configs are read.

        Raises:
            LlavaError: no such model or backend, or a precision that it does not compute in.
        """
        spec = open_spec(config.model)
        backend, devices = _planned_backend(config.backend.name, registry)
        return cls(config, spec, backend, _planned_dtype(config.train.precision, backend, bool(devices)), devices)

    def check(self, world_size: int) -> Layout:
        """The layout over so many processes.

        Raises:
            LlavaError: a setting that the run would refuse, whatever its data; of a backend whose device is not here,
                what it would refuse is not asked.
        """
        check_lora(self.config)
        layout = Layout.of(self.config.parallel, world_size)
        check_shares(self.config, layout)
        check_trainable(self.config, self.spec)
        check_recompute(self.config, self.spec)
        check_data_settings(self.config, self.spec)
        check_tensor(self.spec, layout.tensor)
        pipeline_stages(self.config, self.spec)
        if self.devices:
            check_backend(self.config, Hardware(self.backend, torch.device(self.backend.device_type)))
        check_not_offloaded(self.config)
        return layout

    @property
    def adapters(self) -> Adapters | None:
        """What learns beside the weights; their values, of an earlier adapter say, are not looked at."""
        return None if self.config.lora is None else adapters_of(self.config.lora)

    def device_memory(self, world_size: int) -> int | None:
        """Bytes of a device that is here, for one of so many processes; None where that is not known."""
        shared = self.backend.device_type == HOST and world_size > 1
        return self.devices[0].memory_bytes if self.devices and not shared else None


def planned_config(source: str, overrides: Sequence[str], options: dict[str, str]) -> RunConfig:
    """As `load_config`, but for a config to which its data may still have to be given. Raises ConfigError."""
    settings = merge(source, overrides, options=options)
    data = settings.get("data") or {}
    if isinstance(data, dict) and not data.get("sources"):
        settings["data"] = {**data, "path": data.get("path") or NO_DATA}
    return build_config(settings)


def check_not_offloaded(config: RunConfig) -> None:
    """Nothing is to be moved to the host, which here plays the device: what is on which could not be told apart.

    Raises:
        ConfigError: something is.
    """
    keys = moved_to_host(config)
    if keys:
        raise ConfigError(
            f"{' and '.join(keys)}: a plan cannot count what is moved to the host; leave it out of the plan."
        )


def memory_bytes(text: str) -> int:
    """Bytes of a size such as `80GB` or `64GiB`.

    Raises:
        ConfigError: it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if match is None or match.group(2) not in UNITS or float(match.group(1)) == 0:
        raise ConfigError(f"memory {text!r}: expected a number and one of {', '.join(UNITS)}, e.g. 64GiB.")
    return int(float(match.group(1)) * UNITS[match.group(2)])


def _planned_backend(name: str | None, registry: Registry) -> tuple[Backend, tuple[DeviceInfo, ...]]:
    """The run's backend and its devices here; one that was named may be elsewhere."""
    if name is None:
        backend = choose_backend(None, registry)
        return backend, probe_backend(backend.name, registry).devices
    probe = probe_backend(name, registry)
    return build_backend(name, registry), probe.devices if probe.available else ()


def _planned_dtype(precision: str, backend: Backend, is_here: bool) -> torch.dtype:
    if is_here:
        return compute_dtype(precision, backend)
    if precision not in DTYPES:
        raise ConfigError(
            f"train.precision = {precision}: {backend.name!r} is not on this machine to say what it computes in; name "
            f"one of {', '.join(DTYPES)}."
        )
    return DTYPES[precision]
