"""The backend under test: its device, its kernels, and what they agree to serve."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from llava_core.backend import CATALOGUE, Backend, KernelSpec, MaskFacts, No, OpRequest, reference_kernels
from llava_core.backend.ops import Case
from llava_core.engine.hardware import Hardware
from llava_core.plugins.registry import resolve
from llava_core.testing.conformance.check import CheckFailed, CheckSkipped
from llava_core.testing.kernels import Standard, build_standard, run_case, sample_inputs

HOST = torch.device("cpu")
EITHER = (True, False)
"""Where no gradient is looked at: a kernel for training alone is asked so, one for inference alone the other way."""

PACKED = MaskFacts(packed=True, causal=True)


class Subject:
    """A backend, opened when a check first needs its device.

    Attributes:
        backend: an instance of its class.
        host: the backend that the ladder compares with.
        plugin_module: the module of its entry point; None for a class that no plugin registers.
    """

    def __init__(self, backend: Backend, host: Backend, plugin_module: str | None = None) -> None:
        self.backend = backend
        self.host = host
        self.plugin_module = plugin_module
        self._standards: dict[tuple[str, str, torch.dtype], tuple[list[Any], Standard]] = {}

    @cached_property
    def hardware(self) -> Hardware:
        """The opened device; with deterministic kernels and as many host threads as the process has."""
        probe = type(self.backend).probe()
        if not probe.available:
            raise CheckSkipped(f"the backend cannot run here: {probe.reason}")
        threads = torch.get_num_threads()
        return Hardware(self.backend, self.backend.open(0, threads=threads, deterministic=True))

    @cached_property
    def host_hardware(self) -> Hardware:
        """The host, opened in the same way."""
        return Hardware(self.host, self.host.open(0, threads=torch.get_num_threads(), deterministic=True))

    @property
    def device(self) -> torch.device:
        """Where the kernels run."""
        return self.hardware.device

    @property
    def address(self) -> str:
        """Where another process finds the backend's class."""
        kind = type(self.backend)
        return f"{kind.__module__}:{kind.__qualname__}"

    @cached_property
    def kernels(self) -> tuple[KernelSpec, ...]:
        """The backend's kernels and the references, by op and then priority."""
        order = list(CATALOGUE)
        listed = [k for k in (*self.backend.kernels(), *reference_kernels()) if k.op in CATALOGUE]
        return tuple(sorted(listed, key=lambda k: (order.index(k.op), -k.priority)))

    @cached_property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """What the backend computes in, the widest first."""
        return tuple(sorted(self.backend.precision.compute, key=lambda d: (-d.itemsize, str(d))))

    def kernel_dtypes(self, op: str | None = None) -> Iterator[tuple[KernelSpec, torch.dtype]]:
        """Every kernel (of an op) with every dtype."""
        for kernel in self.kernels:
            if op is None or kernel.op == op:
                yield from ((kernel, dtype) for dtype in self.dtypes)

    def require(
        self,
        kernel: KernelSpec,
        dtype: torch.dtype,
        described: Mapping[str, Any],
        gradients: Sequence[bool] = (True,),
    ) -> Callable[..., Any]:
        """The kernel's function, if it agrees to serve what is described, with one of these choices of gradients.

        Raises:
            CheckSkipped: it refuses, or its library is not here; with the reason.
            CheckFailed: it refuses without one.
        """
        reason = self.refusal(kernel, dtype, described, gradients)
        if reason is not None:
            if not reason.strip():
                raise CheckFailed("the kernel refuses the request and gives no reason")
            raise CheckSkipped(f"refused: {reason}")
        return self._load(kernel)

    def refusal(
        self,
        kernel: KernelSpec,
        dtype: torch.dtype,
        described: Mapping[str, Any],
        gradients: Sequence[bool] = (True,),
    ) -> str | None:
        """Why the kernel does not serve a request; None if it does.

        A mask is asked for alone and, if refused, together with packed training: some kernels are offered for the
        packed calls of a site, and agree to serve the site's other calls too.
        """
        asked = [dict(described)]
        if described.get("masks") and PACKED not in described["masks"]:
            asked.append({**described, "masks": (PACKED, *described["masks"])})
        reasons = []
        for needs_grad in gradients:
            for facts in asked:
                verdict = kernel.verdict(build_request(kernel, dtype, facts, needs_grad=needs_grad))
                if not isinstance(verdict, No):
                    return None
                reasons.append(verdict.reason)
        return reasons[0]

    def standard(self, op: str, case: Case, dtype: torch.dtype) -> tuple[list[Any], Standard]:
        """A case's inputs on the host and what results on them are held against.

        The reference's own error is measured on the host: a device on which every op is inexact must not excuse its
        kernels by it.
        """
        key = (op, case.name, dtype)
        if key not in self._standards:
            inputs = sample_inputs(case, dtype)
            self._standards[key] = inputs, build_standard(CATALOGUE[op], case, inputs, HOST)
        return self._standards[key]

    def run(
        self, kernel: KernelSpec, function: Callable[..., Any], case: Case, inputs: Sequence[Any]
    ) -> dict[str, Tensor]:
        """Outputs and gradients of the kernel, for inputs on the device."""
        with determinism(kernel.deterministic):
            return run_case(function, case, inputs)

    def _load(self, kernel: KernelSpec) -> Callable[..., Any]:
        try:
            function: Callable[..., Any] = resolve(kernel.load)
        except ImportError as error:  # selection would go on to the next kernel for this reason
            raise CheckSkipped(f"cannot be imported: {error}") from error
        return function


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """PyTorch's deterministic mode, and back."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def build_request(
    kernel: KernelSpec, dtype: torch.dtype, described: Mapping[str, Any], *, needs_grad: bool = True
) -> OpRequest:
    """A request as deterministic as the kernel claims to be."""
    return OpRequest(kernel.op, kernel.op, dtype, needs_grad, kernel.deterministic, **described)


def dtype_name(dtype: torch.dtype) -> str:
    """`float32`, not `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def target(kernel: KernelSpec, *more: object) -> str:
    """How checks of a kernel name what they look at."""
    words = [dtype_name(m) if isinstance(m, torch.dtype) else str(m) for m in more]
    return "/".join([kernel.op, kernel.name, *words])
