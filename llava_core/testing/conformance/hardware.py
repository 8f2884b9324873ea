"""Checks of what a backend states about its device, and of its random state, memory counters and optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llava_core.testing.conformance.check import Check, CheckFailed, CheckSkipped
from llava_core.testing.conformance.ladder_model import build_ladder
from llava_core.testing.conformance.subject import HOST, Subject, dtype_name

BLOCK = 64 << 20
"""Bytes: far above what allocators round to, far below what any device has."""

MEMORY_ATTEMPTS = 3
"""Where the device is the host, its system may take pages back at any time, and more than a block of them."""

OPTIMIZER_STEPS = 5
OPTIMIZER_TOLERANCE = 1e-4
"""Of the largest change of a weight, for AdamW in fp32 against float64. Each step rounds weights of up to 3 by 1e-7 and
they change by 0.05 in all: PyTorch's own is off by 1e-5. A decay left out or a bias not corrected is above 1e-2."""


def checks(subject: Subject) -> Iterator[Check]:
    """One check a part of the interface."""
    listed = {
        "device.precision": ("it computes in each dtype that it states, the default among them", _check_precision),
        "rng.seed": ("a seed decides what is drawn on the device and on the host", _check_seed),
        "rng.round_trip": ("a saved random state returns, and is made of bytes on the host", _check_round_trip),
        "memory.statistics": ("the peak rises with use, and falls after a reset", _check_memory),
        "optimizer.update": ("its AdamW is AdamW", _check_optimizer),
        "sync.step": ("forward and backward never wait for the device", _check_sync),
    }
    for name, (explanation, run) in listed.items():
        yield Check(name, "", explanation, partial(run, subject))


def _check_precision(subject: Subject) -> str:
    caps = subject.backend.precision
    if caps.default not in caps.compute:
        raise CheckFailed(f"the default {caps.default} is not among {sorted(map(str, caps.compute))}")
    if not caps.reason.strip():
        raise CheckFailed("no reason for the default")
    for dtype in subject.dtypes:
        a, b = torch.full((8, 16), 0.5, dtype=dtype), torch.full((16, 8), 2.0, dtype=dtype)
        product = (a.to(subject.device) @ b.to(subject.device)).cpu()
        if not torch.equal(product, torch.full((8, 8), 16.0, dtype=dtype)):
            raise CheckFailed(f"a matmul in {dtype_name(dtype)} with an exact answer has another one")
    return ", ".join(dtype_name(d) for d in subject.dtypes)


def _draw(subject: Subject) -> tuple[Tensor, Tensor]:
    """What the device's and the host's generators give next."""
    return torch.rand(64, device=subject.device).cpu(), torch.rand(64)


def _equal(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> list[bool]:
    return [torch.equal(a, b) for a, b in zip(first, second, strict=True)]


def _copy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def _check_seed(subject: Subject) -> str:
    device, rng = subject.device, subject.backend.rng
    before = _copy(rng.state())
    try:
        draws = []
        for seed in (3, 4, 3):
            rng.seed(seed)
            draws.append(_draw(subject))
    finally:
        rng.load_state(before)
    for where, same, other in zip((device, HOST), _equal(draws[0], draws[2]), _equal(draws[0], draws[1]), strict=True):
        if not same:
            raise CheckFailed(f"the same seed gives other numbers on {where}")
        if other:
            raise CheckFailed(f"two seeds give the same numbers on {where}")
    return ""


def _check_round_trip(subject: Subject) -> str:
    _, rng = subject.device, subject.backend.rng
    before = _copy(rng.state())
    try:
        rng.seed(3)
        _draw(subject)
        state = rng.state()
        for name, tensor in state.items():
            if tensor.dtype != torch.uint8 or tensor.device != HOST:
                raise CheckFailed(f"state {name!r} is {tensor.dtype} on {tensor.device}, not bytes on the host")
        kept = _copy(state)
        first = _draw(subject)
        if any(not torch.equal(state[name], kept[name]) for name in kept):
            raise CheckFailed("a state changes after it was taken: it must be a copy")
        rng.seed(5)
        rng.load_state(kept)
        for where, same in zip((subject.device, HOST), _equal(first, _draw(subject)), strict=True):
            if not same:
                raise CheckFailed(f"after load_state, {where} draws other numbers than after state()")
    finally:
        rng.load_state(before)
    return ", ".join(sorted(kept))


def _memory_problem(subject: Subject, num_bytes: int) -> str | None:
    """What is wrong with the peak when a block of so many bytes comes and goes."""
    memory = subject.backend.memory
    subject.backend.synchronize()
    memory.reset_peak()
    before = memory.peak_bytes()
    block = torch.ones(num_bytes, dtype=torch.uint8, device=subject.device)
    subject.backend.synchronize()
    rise = memory.peak_bytes() - before
    del block
    memory.reset_peak()
    left = memory.peak_bytes() - before
    # Other threads of the process may allocate or free meanwhile: half a block either way.
    if not num_bytes / 2 <= rise <= num_bytes * 3 / 2:
        return f"{num_bytes} bytes were allocated, and the peak rose by {rise}"
    if left > num_bytes / 2:
        return f"{num_bytes} bytes were freed and the peak reset, and it is still {left} above the start"
    return None


def _check_memory(subject: Subject) -> str:
    device, memory = subject.device, subject.backend.memory
    total = memory.total_bytes()
    if total == 0 and device.type == HOST.type:
        raise CheckSkipped("this system does not say how much memory there is")
    held, num_bytes = [], BLOCK
    for _ in range(MEMORY_ATTEMPTS):
        problem = _memory_problem(subject, num_bytes)
        if problem is None:
            break
        # A process that has freed much may find the next block there: fill such a place, and ask for more.
        held.append(torch.ones(num_bytes, dtype=torch.uint8, device=device))
        num_bytes *= 2
    if problem is not None:
        raise CheckFailed(problem)
    if not memory.peak_bytes() <= total:
        raise CheckFailed(f"the peak of {memory.peak_bytes()} bytes is above the total of {total}")
    return f"{total / 2**30:.1f} GiB in total"


def _check_optimizer(subject: Subject) -> str:
    expected, start = _train_parameters(None, torch.float64, HOST)
    found, _ = _train_parameters(subject, torch.float32, subject.device)
    changed = max(float((e - s).abs().max()) for e, s in zip(expected, start, strict=True))
    error = max(float((f - e).abs().max()) for f, e in zip(found, expected, strict=True)) / changed
    if not error <= OPTIMIZER_TOLERANCE:
        raise CheckFailed(f"after {OPTIMIZER_STEPS} steps the weights are off by {error:.3g} of their change")
    return f"off by {error:.1e} of the weights' change"


def _train_parameters(
    subject: Subject | None, dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """Two groups, one decaying, after a few steps on given gradients, and before; PyTorch's AdamW without a subject."""
    generator = torch.Generator().manual_seed(4)
    start = [torch.randn(shape, generator=generator, dtype=torch.float32).double() for shape in ((7, 5), (64,))]
    parameters = [x.to(device, dtype, copy=True).requires_grad_() for x in start]
    groups: list[dict[str, Any]] = [
        {"params": [parameter], "lr": lr, "weight_decay": decay}
        for parameter, lr, decay in zip(parameters, (1e-2, 3e-3), (0.1, 0.0), strict=True)
    ]
    betas, eps = (0.9, 0.95), 1e-8
    own = subject.backend.build_optimizer(groups, betas=betas, eps=eps) if subject is not None else None
    if subject is not None and own is None:
        raise CheckSkipped("the backend has no optimizer of its own; the reference is used")
    optimizer = own if own is not None else torch.optim.AdamW(groups, betas=betas, eps=eps)
    for _ in range(OPTIMIZER_STEPS):
        for parameter in parameters:
            gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.grad = gradient.to(device, dtype)
        optimizer.step()
    return [p.detach().to("cpu", torch.float64) for p in parameters], start


def _check_sync(subject: Subject) -> str:
    device = subject.device
    module = torch.get_device_module(device.type)
    set_mode, get_mode = (getattr(module, f"{verb}_sync_debug_mode", None) for verb in ("set", "get"))
    if set_mode is None or get_mode is None:
        raise CheckSkipped(f"PyTorch has no way to see waits for a device of type {device.type!r}")
    ladder = build_ladder(subject.hardware, subject.backend.precision.default)
    batches = [(batch.to(device), weights.to(device)) for batch, weights in ladder.micro_batches(0)]
    ladder.backward(batches)  # what is made once, on first use, may wait
    subject.backend.synchronize()
    before, value = get_mode(), torch.ones((), device=device)
    set_mode("error")
    try:
        if not _raises_on_a_wait(value):
            raise CheckSkipped(f"asked to raise where a value is read back, PyTorch does not on {device.type!r}")
        ladder.backward(batches)
    except RuntimeError as error:
        raise CheckFailed(f"the step waits for the device: {error}") from error
    finally:
        set_mode(before)
    return ""


def _raises_on_a_wait(value: Tensor) -> bool:
    try:
        value.item()
    except RuntimeError:
        return True
    return False
