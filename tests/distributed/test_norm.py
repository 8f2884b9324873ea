"""The norm over all processes is that of the whole gradients, and clipping is torch's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from llava_core.engine.norm import clip_gradients, global_norm
from tests.distributed.processes import run_processes

HOST = torch.device("cpu")

# Over a mesh of (2, 2); seven rows are shared unevenly.
PLACEMENTS: dict[str, tuple[Placement, ...]] = {
    "rows_over_all": (Shard(0), Shard(0)),
    "rows_and_columns": (Shard(0), Shard(1)),
    "rows_of_replicas": (Replicate(), Shard(0)),
    "replicas": (Replicate(), Replicate()),
}


def gradients() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = (*PLACEMENTS, "on_one_axis", "plain")
    return {name: torch.randn(7, 6, generator=generator) * (i + 1) for i, name in enumerate(names)}


def parameter(gradient: Tensor) -> nn.Parameter:
    made = nn.Parameter(torch.zeros_like(gradient))
    made.grad = gradient.clone()
    return made


def placed() -> dict[str, nn.Parameter]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    grads = gradients()
    parameters = {n: parameter(distribute_tensor(grads[n], mesh, p)) for n, p in PLACEMENTS.items()}
    # As of data parallelism beside an axis that the parameter knows nothing of.
    parameters["on_one_axis"] = parameter(distribute_tensor(grads["on_one_axis"], mesh["dp"], [Shard(0)]))
    parameters["plain"] = parameter(grads["plain"])
    parameters["without"] = nn.Parameter(torch.zeros(3))
    return parameters


def norm_of(name: str | None) -> float:
    parameters = placed()
    chosen = parameters.values() if name is None else [parameters[name]]
    return float(global_norm(chosen, HOST))


@pytest.mark.parametrize("name", [*PLACEMENTS, "on_one_axis", "plain"])
def test_each_element_counts_once(name: str) -> None:
    wanted = float(gradients()[name].norm())
    assert run_processes(4, norm_of, name) == pytest.approx([wanted] * 4, rel=1e-6)


def test_all_kinds_together() -> None:
    wanted = math.sqrt(sum(float(g.norm()) ** 2 for g in gradients().values()))
    assert run_processes(4, norm_of, None) == pytest.approx([wanted] * 4, rel=1e-6)


def norm_of_stages() -> float:
    """Ranks 0 and 1 are one stage, with two parameters, 2 and 3 the other, with one."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    grads = gradients()
    if mesh.get_local_rank("pp") == 0:
        own = [parameter(grads["plain"]), parameter(distribute_tensor(grads["replicas"], mesh["dp"], [Shard(0)]))]
    else:
        own = [parameter(distribute_tensor(grads["rows_over_all"], mesh["dp"], [Shard(1)]))]
    return float(global_norm(own, HOST, stages=2))


def test_stages_with_parameters_of_their_own() -> None:
    grads = gradients()
    wanted = math.sqrt(sum(float(grads[n].norm()) ** 2 for n in ("plain", "replicas", "rows_over_all")))
    assert run_processes(4, norm_of_stages) == pytest.approx([wanted] * 4, rel=1e-6)


def norm_of_rank_0_alone() -> float:
    own = [parameter(gradients()["plain"])] if distributed.get_rank() == 0 else []
    return float(global_norm(own, HOST, stages=2))


def test_a_process_may_have_no_gradient() -> None:
    assert run_processes(2, norm_of_rank_0_alone) == pytest.approx([float(gradients()["plain"].norm())] * 2)


def clipped(limit: float) -> dict[str, Tensor]:
    parameters = placed()
    clip_gradients(parameters.values(), global_norm(parameters.values(), HOST), limit)
    grads = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in grads.items()}


@pytest.mark.parametrize("limit", [0.5, 1e3])
def test_clipping_is_torchs(limit: float) -> None:
    alone = {name: parameter(gradient) for name, gradient in gradients().items()}
    nn.utils.clip_grad_norm_(alone.values(), limit)
    for found in run_processes(4, clipped, limit):
        for name, p in alone.items():
            torch.testing.assert_close(found[name], p.grad, rtol=2e-6, atol=0)


def test_alone_it_is_torchs_to_the_bit() -> None:
    ours, theirs = ([parameter(g) for g in gradients().values()] for _ in range(2))
    norm = global_norm(ours, HOST)
    clip_gradients(ours, norm, 0.5)
    assert torch.equal(norm, nn.utils.clip_grad_norm_(theirs, 0.5))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))
    assert global_norm([], HOST) == 0


def overflowed() -> float:
    own = parameter(torch.full((3,), math.inf if distributed.get_rank() == 1 else 1.0))
    return float(global_norm([own], HOST))


def test_every_process_sees_an_overflow_of_one() -> None:
    assert run_processes(2, overflowed) == [math.inf, math.inf]
