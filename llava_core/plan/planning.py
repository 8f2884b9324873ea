"""A plan: what a run's step needs, and what the device's memory would suffice for."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from llava_core.model.freeze import PARTS, part_of
from llava_core.plan.estimate import Estimate, estimate
from llava_core.plan.fit import Fit, largest_fit
from llava_core.plan.memory import KINDS
from llava_core.plan.step import PlannedStep
from llava_core.plan.subject import Subject
from llava_core.weights.load import outline


@dataclass(frozen=True)
class Plan:
    """What `llava-core plan` shows.

    Attributes:
        memory: bytes of a device; None where it is not known.
        fit: the largest micro-batch for it.
    """

    subject: Subject
    estimate: Estimate
    memory: int | None
    fit: Fit | None

    def part_sizes(self) -> list[tuple[str, bool, int, int]]:
        """Each part of the model: its name, whether it learns, and parameters of the whole and of this process."""
        whole: Counter[str] = Counter()
        own: Counter[str] = Counter()
        for name, weight in outline(self.subject.spec, adapters=self.subject.adapters).named_parameters():
            whole[part_of(name)] += weight.numel()
        for parameter in self.estimate.parameters:
            own[parameter.part] += parameter.num_local
        trainable = self.subject.config.train.trainable
        return [(part, part in trainable, whole[part], own[part]) for part in PARTS if whole[part]]

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values; memory in bytes."""
        found = self.estimate
        return {
            "backend": self.subject.backend.name,
            "backend_is_here": bool(self.subject.devices),
            "precision": str(found.dtype).removeprefix("torch."),
            "rank": found.rank,
            "layout": asdict(found.layout),
            "step": {
                "sample_tokens": found.step.sample_tokens,
                "micro_samples": found.step.micro_samples,
                "micro_batches": found.step.micro_batches,
                "samples": self.subject.config.batch.global_size,
                "tokens": self.subject.config.batch.global_size * found.step.sample_tokens,
                "flops": found.flops,
            },
            "parts": [
                {"part": part, "trained": trained, "parameters": whole, "parameters_here": own}
                for part, trained, whole, own in self.part_sizes()
            ],
            "memory": {
                "peak": found.peak,
                "at_peak": {kind: found.memory_at_peak.get(kind, 0) for kind in KINDS},
                "largest": {kind: found.largest.get(kind, 0) for kind in KINDS},
                "device": self.memory,
            },
            "largest_micro_batch": None if self.fit is None else asdict(self.fit),
            "kernels": found.kernels,
            "collectives": [asdict(collective) for collective in found.collectives],
            "parameters": [asdict(parameter) for parameter in found.parameters],
        }


def make_plan(
    subject: Subject, world_size: int, rank: int, *, sample_tokens: int | None = None, memory: int | None = None
) -> Plan:
    """The plan of one rank. One process plans for one rank: PyTorch remembers which part of a tensor is whose.

    Args:
        sample_tokens: of a typical sample; the longest, if not given.
        memory: bytes of a device, for which the largest micro-batch is looked for.

    Raises:
        LlavaError: what the run would refuse.
    """
    layout = subject.check(world_size)
    step = PlannedStep.of(subject.config, layout, sample_tokens)
    found = estimate(subject, layout, rank, step)
    if memory is None:
        return Plan(subject, found, None, None)

    def peak_of(samples: int) -> int:
        if samples == step.micro_samples:
            return found.peak
        return estimate(subject, layout, rank, step.with_micro_samples(samples)).peak

    fit = largest_fit(peak_of, memory, step.micro_samples, limit=step.own_samples)
    return Plan(subject, found, memory, fit)
