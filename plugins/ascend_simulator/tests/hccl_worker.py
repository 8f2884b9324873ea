"""What test_distributed.py runs in each rank: every check raises on what is wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
RANKS = range(WORLD)


def expect(actual: Tensor, expected: list[float]) -> None:
    assert actual.float().cpu().flatten().tolist() == expected, (RANK, actual, expected)


def own(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """rank + 1, `size` times."""
    return torch.full((size,), RANK + 1, dtype=dtype, device="npu")


def check_all_reduce() -> None:
    total = sum(rank + 1 for rank in RANKS)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64):
        reduced = own(3, dtype)
        dist.all_reduce(reduced)
        expect(reduced, [total] * 3)
    for op, expected in (
        (dist.ReduceOp.MAX, WORLD),
        (dist.ReduceOp.MIN, 1),
        (dist.ReduceOp.AVG, total / WORLD),
    ):
        reduced = own(2, torch.bfloat16 if op == dist.ReduceOp.MAX else torch.float32)
        dist.all_reduce(reduced, op=op)
        expect(reduced, [expected] * 2)


def check_halves_round_to_nearest_even() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        parts = [torch.randn(512, generator=torch.Generator().manual_seed(rank)).to(dtype) for rank in RANKS]
        reduced = parts[RANK].npu()
        dist.all_reduce(reduced)
        expected = parts[0]
        for part in parts[1:]:
            expected = (expected.float() + part.float()).to(dtype)
        assert torch.equal(reduced.cpu(), expected)


def check_gather_and_scatter() -> None:
    gathered = torch.empty(2 * WORLD, device="npu")
    dist.all_gather_into_tensor(gathered, own(2))
    expect(gathered, [rank + 1 for rank in RANKS for _ in range(2)])
    part = torch.empty(2, device="npu")
    dist.reduce_scatter_tensor(part, torch.arange(2.0 * WORLD, device="npu"))
    expect(part, [WORLD * (2 * RANK + i) for i in range(2)])
    parts = [torch.empty(3, device="npu") for _ in RANKS]
    dist.all_gather(parts, own(3))
    expect(torch.cat(parts), [rank + 1 for rank in RANKS for _ in range(3)])


def check_broadcast_and_barrier() -> None:
    value = own(3)
    dist.broadcast(value, src=1)
    expect(value, [2.0] * 3)
    dist.barrier()
    names: list[object] = [None] * WORLD
    dist.all_gather_object(names, {"rank": RANK})
    assert names == [{"rank": rank} for rank in RANKS]


def check_all_to_all() -> None:
    received = torch.empty(WORLD, device="npu")
    dist.all_to_all_single(received, torch.arange(float(WORLD), device="npu") + 10 * RANK)
    expect(received, [10 * rank + RANK for rank in RANKS])
    # Rank r sends i + 1 elements to rank i.
    received = torch.empty((RANK + 1) * WORLD, device="npu")
    sizes = [i + 1 for i in RANKS]
    dist.all_to_all_single(received, own(sum(sizes)), [RANK + 1] * WORLD, sizes)
    expect(received, [rank + 1 for rank in RANKS for _ in range(RANK + 1)])


def check_point_to_point() -> None:
    after, before = (RANK + 1) % WORLD, (RANK - 1) % WORLD
    received = torch.empty(2, device="npu")
    operations = [dist.P2POp(dist.irecv, received, before), dist.P2POp(dist.isend, own(2), after)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    expect(received, [before + 1] * 2)
    if RANK == 0:
        dist.send(own(4), 1)
    elif RANK == 1:
        received = torch.empty(4, device="npu")
        dist.recv(received, 0)
        expect(received, [1.0] * 4)


def check_groups() -> None:
    for first in range(0, WORLD, 2):
        group = dist.new_group([first, first + 1])
        if RANK in (first, first + 1):
            reduced = own(2)
            dist.all_reduce(reduced, group=group)
            expect(reduced, [2 * first + 3] * 2)


def check_that_compute_waits_for_collectives() -> None:
    """Collectives go through torch_npu's task queue: what is computed next must see what they wrote."""
    for _ in range(20):
        reduced = own(1000)
        work = dist.all_reduce(reduced, async_op=True)
        work.wait()
        assert (reduced * 2)[-1].item() == WORLD * (WORLD + 1)


def build_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 6))


def train(model: nn.Module, inputs: Callable[[int], Tensor]) -> tuple[list[float], list[float]]:
    """The losses and the gradients' norms of three steps."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=True)
    losses, norms = [], []
    for step in range(3):
        loss = model(inputs(step)).square().mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        norms.append((norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item())
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if mean.device.type == "npu":
            dist.all_reduce(mean, op=dist.ReduceOp.AVG)
        losses.append(mean.item())
    return losses, norms


def global_batch(step: int) -> Tensor:
    return torch.randn(4 * WORLD, 8, generator=torch.Generator().manual_seed(step))


def check_fsdp_and_ddp_train_as_one_process_on_the_host() -> None:
    expected = train(build_model(), global_batch)
    sharded = build_model().npu()
    for layer in sharded:
        fully_shard(layer)
    fully_shard(sharded)
    replicated = nn.parallel.DistributedDataParallel(build_model().npu())
    for model in (sharded, replicated):
        actual = train(model, lambda step: global_batch(step)[4 * RANK : 4 * RANK + 4].npu())
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def check_distributed_tensors() -> None:
    mesh = init_device_mesh("npu", (WORLD,))
    torch.manual_seed(0)
    left, right = torch.randn(8, 4), torch.randn(4, 6)
    product = distribute_tensor(left.npu(), mesh, [Shard(0)]) @ distribute_tensor(right.npu(), mesh, [Replicate()])
    torch.testing.assert_close(product.full_tensor().cpu(), left @ right)
    summed = distribute_tensor(left.npu(), mesh, [Shard(0)]).sum(0)
    torch.testing.assert_close(summed.full_tensor().cpu(), left.sum(0))


def main() -> None:
    torch.npu.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("hccl")
    assert dist.get_backend() == "hccl"
    checks = [check for name, check in globals().items() if name.startswith("check_")]
    for check in checks:
        check()
    # In one write: print sends the text and the end of the line apart, and another rank may come between.
    sys.stdout.write(f"rank {RANK} passed {len(checks)} checks\n")
    sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
