"""torch_npu's own ProcessGroupHCCL between processes, over the simulated HCCL."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "hccl_worker.py"


def launch(num_ranks: int, *program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    simulator = [sys.executable, "-m", "ascend_simulator.cli", "run", "--devices", str(num_ranks), "--"]
    launcher = ["torchrun", "--nproc-per-node", str(num_ranks), "--rdzv-backend", "c10d"]
    command = [*simulator, *launcher, "--rdzv-endpoint", "127.0.0.1:0", *program]
    own = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=own, check=False, timeout=300)


# The queue is torch_npu's default; 0 launches collectives in the thread that asks for them.
@pytest.mark.parametrize(("num_ranks", "task_queue"), [(2, "1"), (2, "0"), (4, "2")])
def test_collectives_groups_and_training(num_ranks: int, task_queue: str) -> None:
    done = launch(num_ranks, str(WORKER), TASK_QUEUE_ENABLE=task_queue)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(line for line in done.stdout.splitlines() if line.startswith("rank")) == [
        f"rank {rank} passed 10 checks" for rank in range(num_ranks)
    ]
    assert done.stderr.count("SIMULATED") == 1


def test_a_rank_that_does_not_come_is_noticed(tmp_path: Path) -> None:
    program = tmp_path / "alone.py"
    program.write_text(
        "import os, torch, torch.distributed as dist\n"
        "torch.npu.set_device(int(os.environ['LOCAL_RANK']))\n"
        "dist.init_process_group('hccl')\n"
        "if dist.get_rank() == 0:\n"
        "    x = torch.ones(2).npu(); dist.all_reduce(x); print(x.cpu())\n",
        encoding="utf-8",
    )
    done = launch(2, str(program), HCCL_EXEC_TIMEOUT="2")
    assert done.returncode != 0
    assert "rank 0 waited 2 s for rank 1" in done.stderr
