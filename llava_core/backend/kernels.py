"""Which kernel runs an op, and why the others do not."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from llava_core.backend.masks import MaskFacts
from llava_core.errors import KernelUnavailable
from llava_core.plugins.registry import resolve


@dataclass(frozen=True)
class Yes:
    """The kernel can serve the request."""


@dataclass(frozen=True)
class No:
    """The kernel cannot serve the request."""

    reason: str


Verdict: TypeAlias = Yes | No


@dataclass(frozen=True)
class OpRequest:
    """What one place in the model will ask of an op. Facts an op does not have stay None.

    Attributes:
        op: a name of the catalogue.
        site: the place that asks, a field of `OpSet`.
        dtype: dtype of the activations.
        needs_grad: whether a backward pass follows.
        deterministic: whether the same input must give the same bits.
        head_dim, num_heads, num_kv_heads: attention's sizes.
        masks: every kind of mask that the site will pass.
        max_length: the longest sequence that can occur.
    """

    op: str
    site: str
    dtype: torch.dtype
    needs_grad: bool
    deterministic: bool
    head_dim: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    masks: tuple[MaskFacts, ...] = ()
    max_length: int | None = None


@dataclass(frozen=True)
class KernelSpec:
    """One implementation of an op.

    Attributes:
        op: the op it implements, with the reference's signature.
        name: unique within the op.
        load: its address, `package.module:function`; imported only if it is chosen.
        priority: the highest that supports a request is chosen; the reference has 0.
        supports: answers `Yes` or `No(reason)`; must be honest, for nothing is checked later.
        deterministic: whether the same input gives the same bits.
        requires: a module that must be installed.
    """

    op: str
    name: str
    load: str
    priority: int
    supports: Callable[[OpRequest], Verdict]
    deterministic: bool = True
    requires: str | None = None

    def verdict(self, request: OpRequest) -> Verdict:
        """Whether this kernel serves `request` in this environment."""
        if self.requires is not None and not is_installed(self.requires):
            return No(f"{self.requires} is not installed")
        if request.deterministic and not self.deterministic:
            return No("not deterministic")
        return self.supports(request)


@dataclass(frozen=True)
class Selection:
    """The kernel chosen for a request, and each rejected candidate with its reason."""

    request: OpRequest
    kernel: KernelSpec
    function: Callable[..., Any] = field(repr=False)
    rejected: tuple[tuple[str, str], ...]


def is_installed(module: str) -> bool:
    """Whether a module can be found, without importing it (its parent package is imported, where it has one)."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def always(_: OpRequest) -> Verdict:
    """`supports` of a kernel without limits."""
    return Yes()


def select(kernels: Sequence[KernelSpec], request: OpRequest, pin: str | None = None) -> Selection:
    """The kernel of highest priority that supports `request`; only `pin`, if one is named.

    Raises:
        KernelUnavailable: the pinned kernel does not exist or cannot run, or none can; with every reason.
    """
    candidates = sorted((k for k in kernels if k.op == request.op), key=lambda k: -k.priority)
    if pin is not None:
        pinned = [k for k in candidates if k.name == pin]
        if not pinned:
            known = ", ".join(k.name for k in candidates)
            raise KernelUnavailable(f"{request.site}: no kernel {pin!r} for {request.op}; there are: {known}.")
        candidates = pinned
    rejected: list[tuple[str, str]] = []
    for kernel in candidates:
        function, reason = _try_load(kernel, request)
        if function is not None:
            return Selection(request, kernel, function, tuple(rejected))
        rejected.append((kernel.name, reason))
    reasons = "".join(f"\n  {name}: {reason}" for name, reason in rejected)
    subject = f"the pinned kernel {pin!r}" if pin is not None else "any kernel"
    raise KernelUnavailable(f"{request.site}: {request.op} cannot be served by {subject}:{reasons}")


def select_all(
    kernels: Sequence[KernelSpec], requests: Sequence[OpRequest], pins: Mapping[str, str]
) -> dict[str, Selection]:
    """A selection for each request, by site. `pins` maps sites to kernel names.

    Raises:
        KernelUnavailable: as `select`, or a pin for a site that the model does not have.
    """
    sites = {request.site for request in requests}
    unknown = sorted(set(pins) - sites)
    if unknown:
        raise KernelUnavailable(f"kernels are pinned for {unknown}; this model's sites are {sorted(sites)}.")
    return {request.site: select(kernels, request, pins.get(request.site)) for request in requests}


def _try_load(kernel: KernelSpec, request: OpRequest) -> tuple[Callable[..., Any] | None, str]:
    verdict = kernel.verdict(request)
    if isinstance(verdict, No):
        return None, verdict.reason
    try:
        return resolve(kernel.load), ""
    except Exception as error:  # the plugin boundary: a broken vendor library is a reason, shown with the others
        return None, f"cannot be imported: {type(error).__name__}: {error}"
