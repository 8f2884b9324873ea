"""What each memory-saving setting saves, and what it costs: python benchmarks/memory.py [--backend NAME …]

A LLaVA of the shape of the 7B in small (eight decoder layers of 512, 577 visual positions) learns in stage 2 from one
packed micro-batch. In MiB: `state` is what lasts, weights and the optimizer's state; `kept` is what a forward pass adds
for the backward pass, and `peak` the most that a whole step adds at any time. The host's tensors are counted
(`LiveBytes`), for a device its own counter is asked. CPU seconds, on the host alone, are of one thread, the settings
taking turns, the best of three rounds.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table
from train_step import SAMPLES, benchmark_config, make_samples

from llava_core.config.parallel import ParallelConfig
from llava_core.data.batch import Batch
from llava_core.data.packing import build_batch
from llava_core.engine.hardware import HOST, Hardware, open_hardware
from llava_core.engine.layout import Layout
from llava_core.engine.mesh import Mesh
from llava_core.engine.offload import on_host
from llava_core.engine.opset import Use, build_ops
from llava_core.engine.parts import local_part
from llava_core.engine.processes import Processes
from llava_core.engine.recompute import Keeping, arrange_layers
from llava_core.engine.shard import Sharding, part_of, shard_data
from llava_core.engine.torch_engine import OptimizerSettings, TorchEngine
from llava_core.model.llava import Llava
from llava_core.plugins import Registry
from llava_core.testing.live_bytes import LiveBytes
from llava_core.testing.models import save_folder, tiny_model
from llava_core.weights.load import load_model
from llava_core.weights.source import from_folder

TRAINABLE = frozenset({"projector", "language"})
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROUNDS, MIB = 3, 1 << 20


@dataclass
class Contender:
    """A step under one setting, and what was measured of it."""

    name: str
    engine: TorchEngine
    kept: int = 0
    peak: int = 0
    seconds: float = math.inf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default=HOST)
    parser.add_argument("--layers", type=int, default=8, help="of the decoder; a simulator takes its time")
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"of a step; at most {SAMPLES}")
    parser.add_argument("--precision", choices=DTYPES, nargs="+", default=list(DTYPES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    hardware = open_hardware(options.backend, Registry.discover(), threads=1)
    batch = build_batch(make_samples("stage 2")[: options.samples], pad_id=0, image_size=336)
    table = Table(
        title=f"a step of {options.samples} samples, {batch.counts.tokens:,} tokens, on {hardware.device_name}"
    )
    for column in ("precision", "setting", "state", "kept", "peak", "peak of none", "CPU seconds of none"):
        table.add_column(column)
    group_of_one = hardware.device.type != HOST
    with TemporaryDirectory() as folder, Processes().joined(hardware, timedelta(minutes=5), group_of_one=group_of_one):
        config = benchmark_config()
        config.text_config.num_hidden_layers = options.layers
        save_folder(tiny_model(config), Path(folder))
        for precision in options.precision:
            for row in compare(Path(folder), DTYPES[precision], hardware, batch):
                table.add_row(precision, *row)
    Console(width=120).print(table)


def settings(hardware: Hardware, half: int) -> dict[str, tuple[Keeping, bool]]:
    """By what a user writes: what layers keep, and whether weights are kept on the host."""
    found = {name: (keeping, False) for name, keeping in keepings(hardware, half).items()}
    if hardware.device.type == HOST:
        return found
    everything = "parallel.offload, offload_activations, recompute=full"
    return found | {
        "parallel.offload": (Keeping(), True),
        everything: (Keeping("full", store=on_host(hardware)), True),
    }


def keepings(hardware: Hardware, half: int) -> dict[str, Keeping]:
    """By what a user writes under `train`."""
    found = {
        "none": Keeping(),
        "recompute=selective": Keeping("selective"),
        f"recompute=full, recompute_layers={half}": Keeping("full", half),
        "recompute=full": Keeping("full"),
    }
    if hardware.device.type == HOST:
        return found
    store = on_host(hardware)
    return found | {
        "offload_activations": Keeping(store=store),
        "offload_activations, recompute=selective": Keeping("selective", store=store),
        "offload_activations, recompute=full": Keeping("full", store=store),
    }


def compare(folder: Path, dtype: torch.dtype, hardware: Hardware, batch: Batch) -> list[tuple[str, ...]]:
    """A row for each setting."""
    contenders, half = [], from_folder(folder).spec.text.num_layers // 2
    for name, (keeping, offload) in settings(hardware, half).items():
        contender = Contender(name, build_engine(folder, dtype, hardware, keeping, offload))
        contender.engine.step([batch], 1.0)  # makes the optimizer's state
        contender.kept, contender.peak = measure(contender.engine, batch)
        contenders.append(contender)
    for _ in range(ROUNDS if hardware.device.type == HOST else 0):
        for contender in contenders:
            start = time.process_time()
            contender.engine.step([batch], 1.0)
            contender.seconds = min(contender.seconds, time.process_time() - start)
    base = contenders[0]
    return [
        (
            c.name,
            f"{lasting_bytes(c.engine) / MIB:.0f}",
            f"{c.kept / MIB:.0f}",
            f"{c.peak / MIB:.0f}",
            f"{c.peak / base.peak:.2f}",
            "" if math.isinf(c.seconds) else f"{c.seconds / base.seconds:.2f}",
        )
        for c in contenders
    ]


def lasting_bytes(engine: TorchEngine) -> int:
    """Weights and optimizer state in the memory of the hardware."""
    moments = [x for state in engine.optimizer.state.values() for x in state.values() if x.ndim > 0]
    parts = [local_part(x).data for x in (*engine.model.parameters(), *moments)]
    return sum(x.nbytes for x in parts if x.device.type == engine.hardware.device.type)


def build_engine(folder: Path, dtype: torch.dtype, hardware: Hardware, keeping: Keeping, offload: bool) -> TorchEngine:
    """With its layers so arranged; with `offload` over a mesh of this process."""
    source = from_folder(folder)
    ops, _ = build_ops(source.spec, hardware.backend, Use(dtype, TRAINABLE, 1024, deterministic=False))
    mesh = Mesh.build(Processes(), Layout(), hardware.device.type) if offload else None

    def arrange(model: Llava) -> None:
        arrange_layers(model, keeping)
        if mesh is not None:
            shard_data(model, mesh, Sharding.of(ParallelConfig(offload=True), hardware.backend))

    model = load_model(
        source,
        ops,
        compute_dtype=dtype,
        device=torch.device(HOST) if offload else hardware.device,
        trainable=TRAINABLE,
        arrange=arrange,
        part_of=part_of,
    )
    rates = OptimizerSettings(dict.fromkeys(TRAINABLE, 1e-5), 0.0, (0.9, 0.999), 1e-8, 1.0, on_host=offload)
    return TorchEngine(model, hardware, rates, "token_mean", mesh)


def measure(engine: TorchEngine, batch: Batch) -> tuple[int, int]:
    """Bytes kept between the passes, and at the peak of a step, above those before."""
    gc.collect()
    if engine.hardware.device.type == HOST:
        with LiveBytes(HOST) as live:
            engine.step([batch], 1.0)
            peak = live.peak
        with LiveBytes(HOST) as live:
            loss = forward(engine, batch)
            kept = live.now
            del loss
        return kept, peak
    memory = engine.hardware.backend.memory
    before = bytes_now(engine)
    memory.reset_peak()
    engine.step([batch], 1.0)
    engine.hardware.backend.synchronize()
    peak = memory.peak_bytes() - before
    loss = forward(engine, batch)
    kept = bytes_now(engine) - before
    del loss
    return kept, peak


def bytes_now(engine: TorchEngine) -> int:
    """What the device holds: its peak since now."""
    engine.hardware.backend.synchronize()
    engine.hardware.backend.memory.reset_peak()
    return engine.hardware.backend.memory.peak_bytes()


def forward(engine: TorchEngine, batch: Batch) -> torch.Tensor:
    """The loss, and with it all that its backward pass needs."""
    device, labels = engine.hardware.device, batch.counts.label_tokens
    return engine.model(batch.to(device), torch.full((labels,), 1 / labels, device=device))


if __name__ == "__main__":
    main()
