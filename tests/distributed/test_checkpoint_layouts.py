"""A checkpoint of any layout is loaded under any other: weights, moments and random state bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from llava_core.data.batch import Labelled
from llava_core.engine.layout import Layout
from llava_core.engine.parts import Facts, local_parts
from llava_core.engine.state import collect, restore
from llava_core.engine.torch_engine import TorchEngine
from llava_core.errors import CheckpointError
from llava_core.train.checkpoint import open_newest, save_state
from tests.distributed.layouts import build_engine, build_mesh, take_share, this_process, whole_tensors
from tests.distributed.processes import run_processes
from tests.hardware import hardware
from tests.unit.engine.support import batches, examples

LAYOUTS = {
    "one": Layout(),
    "shard_2": Layout(shard=2),
    "shard_4": Layout(shard=4),
    "replicate_2": Layout(replicate=2),
    "hybrid_2x2": Layout(replicate=2, shard=2),
    "tensor_2": Layout(tensor=2),
    "context_2x2": Layout(shard=2, context=2),
    "pipeline_2": Layout(pipeline=2),
    "pipeline_2x2_interleaved": Layout(pipeline=2, shard=2),
    "pipeline_2_tensor_2": Layout(pipeline=2, tensor=2),
}
STAGE_LAYERS = {"pipeline_2": (1, 3), "pipeline_2x2_interleaved": (1, 1, 1, 1)}


def tiny_engine(name: str, seed: int) -> TorchEngine:
    return build_engine(build_mesh(LAYOUTS[name]), STAGE_LAYERS.get(name, ()), seed)


def take_step(trained: TorchEngine, number: int) -> float:
    """Each process takes its share of the step's four micro-batches."""
    step = batches(examples(trained.model.spec, seed=number), [2, 1, 2, 3])
    return trained.step(take_share(step, trained), 1.0, Labelled.of(step)).loss


def save_under(name: str, root: Path) -> dict[str, Tensor]:
    """Save after two steps; what this process's stages held."""
    torch.manual_seed(distributed.get_rank())  # of the random states it is the first process's that counts
    trained = tiny_engine(name, seed=0)
    for number in range(2):
        take_step(trained, number)
    tensors, state = trained.state()
    save_state(root, 2, local_parts(tensors), state, keep=None, processes=this_process())
    return whole_tensors(tensors)


def load_under(name: str, roots: dict[str, Path]) -> dict[str, dict[str, Tensor]]:
    """What this process of an engine of other weights holds after loading each of the checkpoints."""
    trained = tiny_engine(name, seed=1)
    take_step(trained, 5)
    found = {}
    for source, root in roots.items():
        checkpoint, skipped = open_newest(root, this_process())
        assert checkpoint is not None
        assert skipped == []
        trained.load_state(checkpoint, checkpoint.state)
        found[source] = whole_tensors(trained.state()[0])
    return found


def together(held: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What all stages hold; where several processes hold a tensor, the first one's."""
    return {name: tensor for tensors in reversed(held) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Saved:
    """A checkpoint of each layout, and what it must hold."""

    roots: dict[str, Path]
    expected: dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    roots = {name: tmp_path_factory.mktemp(name) for name in LAYOUTS}
    held = {n: together(run_processes(LAYOUTS[n].world_size, save_under, n, root)) for n, root in roots.items()}
    return Saved(roots, held)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_loads_every_other(name: str, saved: Saved) -> None:
    held = run_processes(LAYOUTS[name].world_size, load_under, name, saved.roots)
    for source, expected in saved.expected.items():
        assert_same_bits(together([found[source] for found in held]), expected)


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    assert any(name.startswith("optimizer.exp_avg_sq.") for name in expected)


def test_a_sharded_checkpoint_holds_each_value_once(saved: Saved) -> None:
    sizes = {n: sum(f.stat().st_size for f in root.rglob("*.safetensors")) for n, root in saved.roots.items()}
    # Beyond the values only headers, of each file: names, shapes and offsets.
    assert max(sizes.values()) < 1.5 * sizes["one"], sizes


def go_on(name: str, root: Path) -> list[float]:
    trained = tiny_engine(name, seed=1)
    checkpoint, _ = open_newest(root, this_process())
    assert checkpoint is not None
    trained.load_state(checkpoint, checkpoint.state)
    return [take_step(trained, number) for number in (2, 3)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_training_goes_on_under_another_layout(name: str, saved: Saved) -> None:
    (expected,) = run_processes(1, go_on, "one", saved.roots["one"])
    for source in ("shard_2", "pipeline_2x2_interleaved"):
        for found in run_processes(LAYOUTS[name].world_size, go_on, name, saved.roots[source]):
            assert found == pytest.approx(expected, rel=1e-5)  # sums over processes; measured 1e-7


# ---- tensor parallel, and FSDP over it


class Toy(nn.Module):
    """Matrices that are cut by columns and by rows, some unevenly."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shapes = {"up": (10, 6), "down": (6, 10), "odd": (7, 5), "bias": (10,), "norm": (6,)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))


TENSOR_DIMS = {"up": 0, "down": 1, "odd": 0, "bias": 0}
TOYS = {"one": (1, 1), "tensor_2": (1, 2), "tensor_4": (1, 4), "shard_2_tensor_2": (2, 2), "shard_4": (4, 1)}
"""Processes that shard, and processes that share matrices."""


def toy(shard: int, tensor: int, seed: int) -> tuple[Toy, torch.optim.AdamW]:
    module = Toy(seed)
    if shard * tensor > 1:
        mesh = init_device_mesh(hardware().device.type, (shard, tensor), mesh_dim_names=("dp", "tp"))
        if tensor > 1:
            for name, dim in TENSOR_DIMS.items():
                value = distribute_tensor(module.get_parameter(name).detach(), mesh["tp"], [Shard(dim)])
                module.register_parameter(name, nn.Parameter(value))
        if shard > 1:
            fully_shard(module, mesh=mesh["dp"])
    return module, torch.optim.AdamW(module.parameters(), lr=0.1)


def learn(module: Toy, optimizer: torch.optim.AdamW) -> None:
    for parameter in module.parameters():
        parameter.grad = parameter.detach() * 3 + 1
    optimizer.step()


def save_toy(sizes: tuple[int, int], root: Path) -> dict[str, Tensor]:
    module, optimizer = toy(*sizes, seed=0)
    learn(module, optimizer)
    tensors, state = collect(dict(module.named_parameters()), optimizer, hardware().backend.rng, None)
    save_state(root, 1, local_parts(tensors), state, keep=None, processes=this_process())
    return whole_tensors(tensors)


def load_toy(sizes: tuple[int, int], roots: dict[str, Path]) -> dict[str, dict[str, Tensor]]:
    module, optimizer = toy(*sizes, seed=1)
    named, rng = dict(module.named_parameters()), hardware().backend.rng
    found = {}
    for name, root in roots.items():
        checkpoint, _ = open_newest(root, this_process())
        assert checkpoint is not None
        restore(checkpoint, {n: Facts(p.dtype, tuple(p.shape)) for n, p in named.items()}, named, optimizer, rng)
        found[name] = whole_tensors(collect(named, optimizer, rng, None)[0])
    learn(module, optimizer)  # what was restored is such that the optimizer goes on with it
    return found


@pytest.fixture(scope="module")
def saved_toys(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    roots = {name: tmp_path_factory.mktemp(name) for name in TOYS}
    held = {n: run_processes(s * t, save_toy, (s, t), roots[n])[0] for n, (s, t) in TOYS.items()}
    return Saved(roots, held)


@pytest.mark.parametrize("name", TOYS)
def test_tensor_parallel_layouts_load_every_other(name: str, saved_toys: Saved) -> None:
    shard, tensor = TOYS[name]
    for found in run_processes(shard * tensor, load_toy, (shard, tensor), saved_toys.roots):
        for source, expected in saved_toys.expected.items():
            assert_same_bits(found[source], expected)


def test_another_model_is_refused_by_every_process(saved_toys: Saved) -> None:
    run_processes(2, load_into_another_model, saved_toys.roots["tensor_2"])


def load_into_another_model(root: Path) -> None:
    trained = tiny_engine("shard_2", seed=0)
    checkpoint, _ = open_newest(root, this_process())
    assert checkpoint is not None
    with pytest.raises(CheckpointError, match="trains other parameters than this run"):
        trained.load_state(checkpoint, checkpoint.state)
