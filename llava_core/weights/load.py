"""Fills a model that was built without memory."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from llava_core.backend import OpSet
from llava_core.errors import WeightsError
from llava_core.model.adapters import Adapters, attach
from llava_core.model.freeze import PARTS, is_adapter, plain_name, train_only
from llava_core.model.llava import Llava
from llava_core.model.projector import Projector
from llava_core.model.spec import ModelSpec
from llava_core.model.stage import Stage
from llava_core.weights.fresh_adapters import fresh_adapters
from llava_core.weights.names import NEWLINE
from llava_core.weights.rows import Sliceable
from llava_core.weights.source import ModelSource

MAX_LISTED = 20


Layout: TypeAlias = Callable[[Tensor], Tensor]
PartOf: TypeAlias = Callable[[nn.Parameter, Sliceable], tuple[Tensor, Layout]]


def leave_whole(model: Llava) -> None:
    """The layout of one process."""


def whole(_: nn.Parameter, tensor: Sliceable) -> tuple[Tensor, Layout]:
    """All of it, as it is."""
    return tensor[(slice(None),) * len(tensor.shape)], lambda part: part


def load_model(
    source: ModelSource,
    ops: OpSet,
    *,
    compute_dtype: torch.dtype,
    device: torch.device,
    trainable: frozenset[str] = frozenset(),
    seed: int = 0,
    arrange: Callable[[Llava], None] = leave_whole,
    part_of: PartOf = whole,
    stage: Stage | None = None,
) -> Llava:
    """The model with its weights, one tensor at a time, so that memory holds it once.

    Trainable parts are fp32 copies; frozen parts have the compute dtype and stay mapped from the file where it has that
    dtype and the device is the host.

    Args:
        seed: of what has no weights yet: a fresh projector, fresh adapters.
        arrange: called with the model while it has no memory; lays its parameters out over processes.
        part_of: from a parameter so laid out and its whole tensor, mapped from the file: this process's part of the
            tensor, and what makes a parameter's value of it.
        stage: what is built and loaded of the model; all of it, if not given.

    Raises:
        WeightsError: parameters that are missing, unexpected or of another shape, all of them listed.
    """
    model = outline(source.spec, trainable, compute_dtype, ops, stage, source.adapters)
    arrange(model)
    tensors: dict[str, Callable[[], Sliceable]] = dict(source.tensors)
    if source.fresh_projector or source.fresh_newline:
        fresh = _fresh_projector(source, seed)
        tensors = (fresh if source.fresh_projector else {NEWLINE: fresh[NEWLINE]}) | tensors
    _check(outline(source.spec), [name for name in tensors if not is_adapter(name)])
    named = list(model.named_parameters())
    tensors = fresh_adapters([(name, p.shape) for name, p in named if is_adapter(name)], tensors, seed) | tensors
    misshapen = []
    for name, parameter in named:
        tensor = tensors[plain_name(name)]()
        if tensor.shape != parameter.shape:
            misshapen.append(f"\n  {name}: the file has {tuple(tensor.shape)}, the config {tuple(parameter.shape)}")
            continue
        part, laid_out = part_of(parameter, tensor)
        # A trained weight is written to, so it must not be the mapped file's own memory.
        value = laid_out(part.to(device, parameter.dtype, copy=parameter.requires_grad))
        assign(model, name, nn.Parameter(value, parameter.requires_grad))
    if misshapen:
        raise WeightsError("the weights do not fit the model of the config:" + "".join(misshapen))
    return model


def outline(
    spec: ModelSpec,
    trainable: Collection[str] = (),
    compute_dtype: torch.dtype = torch.float32,
    ops: OpSet | None = None,
    stage: Stage | None = None,
    adapters: Adapters | None = None,
) -> Llava:
    """The model, or a stage of it, without memory: its parameters' names, shapes and dtypes, and which of them learn.

    Args:
        ops: needed only where weights will follow and the model will compute.
    """
    with torch.device("meta"):
        model = Llava(spec, ops or OpSet.of({}), compute_dtype, stage)
        if adapters is not None:
            attach(model, adapters)
    train_only(model, trainable, adapters.parts if adapters is not None else ())
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else compute_dtype)
    return model


def _fresh_projector(source: ModelSource, seed: int) -> dict[str, Callable[[], Sliceable]]:
    """The original LLaVA's initialisation: PyTorch's own of linear layers, then the newline's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = Projector(source.spec).state_dict()
    return {PARTS["projector"] + name: partial(weights.__getitem__, name) for name in weights}


def _check(model: nn.Module, tensors: Collection[str]) -> None:
    expected = {name for name, _ in model.named_parameters()}
    problems = {"missing": sorted(expected - set(tensors)), "unexpected": sorted(set(tensors) - expected)}
    if any(problems.values()):
        listed = "".join(
            f"\n  {kind} ({len(found)}): {', '.join(found[:MAX_LISTED])}{' …' if len(found) > MAX_LISTED else ''}"
            for kind, found in problems.items()
            if found
        )
        raise WeightsError(f"the weights do not fit the model of the config:{listed}")


def assign(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Set the parameter of this name."""
    module_name, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module_name), leaf, parameter)
