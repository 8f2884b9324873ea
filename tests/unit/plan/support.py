"""What the plan's tests share: configs over model sizes alone, and the memory that a real step takes."""

from __future__ import annotations

import json
import tempfile
from bisect import bisect
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from llava_core.config import RunConfig, build_config
from llava_core.data.batch import Batch
from llava_core.engine.hardware import Hardware, compute_dtype
from llava_core.engine.layout import Layout
from llava_core.engine.mesh import Mesh
from llava_core.engine.opset import Use, build_ops
from llava_core.engine.processes import Processes
from llava_core.engine.torch_engine import TorchEngine
from llava_core.model.spec import ModelSpec, TextSpec, VisionSpec
from llava_core.plan.collectives import NAMES
from llava_core.plan.step import PlannedStep, planned_batch
from llava_core.plan.subject import Subject
from llava_core.train.lora import adapters_of
from llava_core.train.prepare import build_engine
from llava_core.weights.load import outline
from llava_core.weights.source import ModelSource
from llava_cpu.backend import CpuBackend

TEXT = TextSpec("llama", 1024, 256, 704, 4, 4, 4, 64, 1e-5, 2048)
VISION = VisionSpec("clip", 112, 14, 128, 512, 4, 2, "quick_gelu", 1e-5)
SPEC = ModelSpec(TEXT, VISION)
"""Small, and shaped as a real one is: sizes grow as widths, feed-forwards and vocabularies of large models do."""

SMALL = 1e-3
"""Every weight; of zeros DoRA would divide by their norms."""

STEP = "one step"
"""What a real step is called in a trace."""


def run_config(**sections: dict[str, Any]) -> RunConfig:
    """A config of which nothing need exist; two packed micro-batches of two samples a process alone."""
    settings: dict[str, dict[str, Any]] = {
        "model": {"path": "model"},
        "data": {"path": "data.json", "max_length": 512},
        "batch": {"global_size": 4, "micro_tokens": 1024},
        "optimizer": {"learning_rate": 1e-3},
        "train": {"trainable": ["projector", "language"], "max_steps": 2, "precision": "fp32"},
        "parallel": {},
    }
    for name, section in sections.items():
        settings[name] = {**settings.get(name, {}), **section}
        if "micro_size" in section:
            del settings[name]["micro_tokens"]
    return build_config({"output": "run", "backend": {"name": "cpu"}, **settings})


def subject(config: RunConfig, spec: ModelSpec = SPEC) -> Subject:
    """The config on the host."""
    backend = CpuBackend()
    return Subject(config, spec, backend, compute_dtype(config.train.precision, backend), backend.probe().devices)


@dataclass(frozen=True)
class Measured:
    """Real steps, as PyTorch's profiler saw them.

    Attributes:
        peak: the most bytes that its allocator had handed out during a step, of the steps that have an optimizer state.
        sent: exchanges of a step, by kind.
    """

    peak: int
    sent: dict[str, int]


def measure(config: RunConfig, spec: ModelSpec, processes: Processes, num_steps: int = 2) -> Measured:
    """Real steps of this process: the first has no optimizer state yet.

    All that the simulation passes through is real here: weights, samples, kernels, exchanges.
    """
    layout = Layout.of(config.parallel, processes.size)
    step = PlannedStep.of(config, layout)
    batch = planned_batch(spec, step)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=True) as profiled:
        engine = real_engine(config, spec, layout, processes)
        batch = real_batch(batch, spec)
        for _ in range(num_steps):
            with record_function(STEP):
                engine.step([batch] * step.micro_batches, 1.0)
    events = trace_events(profiled)
    names = Counter(
        NAMES.get(event.get("name", "").removeprefix("c10d::")) for event in events if not is_handshake(event)
    )
    return Measured(steady_peak(events), {kind: names[kind] // num_steps for kind in NAMES.values() if names[kind]})


def is_handshake(event: Mapping[str, Any]) -> bool:
    """Whether it sends or receives the one number that a pipeline's neighbours tell each other before a step."""
    is_sent = event.get("name") in ("c10d::send", "c10d::recv_")
    return is_sent and event["args"]["Input Dims"][0] == [[1]]


def real_engine(config: RunConfig, spec: ModelSpec, layout: Layout, processes: Processes) -> TorchEngine:
    """An engine on the host, with all weights alike."""
    backend = CpuBackend()
    dtype, trainable = compute_dtype(config.train.precision, backend), frozenset(config.train.trainable)
    use = Use(dtype, trainable, config.data.max_length, True, layout.tensor, layout.context)
    ops, _ = build_ops(spec, backend, use)
    mesh = Mesh.build(processes, layout, "cpu") if processes.size > 1 else None
    hardware = Hardware(backend, torch.device("cpu"))
    source = replace(constants(spec), adapters=None if config.lora is None else adapters_of(config.lora))
    return build_engine(config, source, ops, dtype, hardware, mesh)


def constants(spec: ModelSpec) -> ModelSource:
    """Weights in a dtype of no run, so that none is shared with the file that it came from."""
    shapes = {name: tuple(p.shape) for name, p in outline(spec).named_parameters()}
    tensors: dict[str, Any] = {n: partial(torch.full, s, SMALL, dtype=torch.float64) for n, s in shapes.items()}
    return ModelSource(spec, tensors, Path(), None, ())


def real_batch(batch: Batch, spec: ModelSpec) -> Batch:
    """With pixels, and tensors of its own."""
    moved: dict[str, Any] = {
        name: getattr(batch, name).clone() for name in ("tokens", "positions", "cu_seqlens", "image_index")
    }
    if batch.feature_index is not None:
        moved["feature_index"] = batch.feature_index.clone()
    size = spec.vision.image_size if spec.vision else 1
    return replace(batch, pixels=torch.zeros(len(batch.pixels), 3, size, size), **moved)


def trace_events(profiled: profile) -> list[dict[str, Any]]:
    """What the profiler recorded."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events: list[dict[str, Any]] = json.loads(trace.read_text())["traceEvents"]
    return events


def steady_peak(events: list[dict[str, Any]]) -> int:
    """The most that was in use during a step, of the steps after the first the one that shows least.

    The profiler does not see what a thread of the process group frees: until its place is taken again, such a block is
    counted. A busy machine shows a block too many so, in some steps, and never one too few.
    """
    starts = sorted(event["ts"] for event in events if event.get("name") == STEP and "dur" in event)
    peaks = [0] * len(starts)
    for time, total in allocated(events):
        step = bisect(starts, time) - 1
        if step >= 0:
            peaks[step] = max(peaks[step], total)
    return min(peaks[1:])


def allocated(events: list[dict[str, Any]]) -> Iterator[tuple[float, int]]:
    """Each time that memory was taken or given back, and what was in use then."""
    changes = (event for event in events if event.get("name") == "[memory]")
    live: dict[int, int] = {}
    total = 0
    for change in sorted(changes, key=lambda event: event["ts"]):
        address, num_bytes = change["args"]["Addr"], change["args"]["Bytes"]
        total -= live.pop(address, 0)
        if num_bytes > 0:
            live[address] = num_bytes
            total += num_bytes
        yield change["ts"], total
