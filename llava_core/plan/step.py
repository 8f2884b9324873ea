"""The step that a plan is made for: equal samples, as long as they may be, with an image each, as large as fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from llava_core.config import RunConfig
from llava_core.data.batch import NEWLINE, Batch, Example, Merge
from llava_core.data.loader import as_many
from llava_core.data.packing import build_batch
from llava_core.data.tiles import Division, Tiling
from llava_core.engine.layout import Layout
from llava_core.errors import ConfigError
from llava_core.model.spec import ModelSpec
from llava_core.plan.simulation import Simulation
from llava_core.train.data import dynamic_tiles, largest_image, pipelined


@dataclass(frozen=True)
class PlannedStep:
    """What the busiest process has of a full step.

    Attributes:
        sample_tokens: text and image tokens of each sample.
        micro_samples: samples of a micro-batch.
        own_samples: of this process in a step.
        spread: whether as many are in each as on average, not in each but the last as many as fit.
        fill: how many micro-batches there are where so many would do.
        tiling: how the samples' images are divided; None: not at all.
    """

    sample_tokens: int
    micro_samples: int
    own_samples: int
    spread: bool = False
    fill: Callable[[int], int] = field(default=as_many, compare=False, repr=False)
    tiling: Tiling | None = None

    @classmethod
    def of(cls, config: RunConfig, layout: Layout, sample_tokens: int | None = None) -> PlannedStep:
        """A step of the config.

        Args:
            sample_tokens: of a typical sample; the longest that the config allows, if not given. Micro-batches that
                these do not fill are filled with one sample more, of a few tokens less each.

        Raises:
            ConfigError: longer than a sample may be.
        """
        batch, longest = config.batch, config.data.max_length
        length = sample_tokens or longest
        if length > longest:
            raise ConfigError(
                f"samples of {length} tokens: data.max_length = {longest}; lower the one or raise the other."
            )
        micro = batch.micro_size
        if micro is None:
            assert batch.micro_tokens is not None
            micro = -(-batch.micro_tokens // length)
            length = batch.micro_tokens // micro
        chunk = batch.micro_size or 1
        own = -(-(batch.global_size // chunk) // layout.data) * chunk
        micro = min(micro, own)
        asked = pipelined(config)
        spread, fill = "one_size" in asked and batch.micro_size is None, asked.get("num_batches", as_many)
        return cls(length, micro, own, spread, fill, dynamic_tiles(config.data)).with_micro_samples(micro)

    def with_micro_samples(self, most: int) -> PlannedStep:
        """The same samples in micro-batches of `most` of them; of fewer, where they are spread over more."""
        number = self.fill(-(-self.own_samples // most))
        return replace(self, micro_samples=-(-self.own_samples // number) if self.spread else most)

    @property
    def micro_batches(self) -> int:
        """Of this process, all taken to be alike; a pipeline's schedule may ask for more than have samples."""
        return self.fill(-(-self.own_samples // self.micro_samples))

    @property
    def micro_tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_samples * self.sample_tokens


def planned_batch(spec: ModelSpec, step: PlannedStep) -> Batch:
    """A micro-batch of the step, every text token of which is supervised. Its pixels are placeholders of one pixel a
    tile: on the device they are replaced."""
    image = largest_image(spec, step.tiling, step.sample_tokens)
    supervised = torch.ones(step.sample_tokens, dtype=torch.bool)
    supervised[: image.visual_tokens if image else 0] = False
    example = Example(
        id="planned",
        tokens=torch.zeros(step.sample_tokens, dtype=torch.int64),
        supervised=supervised,
        image_starts=(0,) if image else (),
        pixels=torch.zeros(image.tiles, 3, 1, 1) if image else None,
        visual_tokens=(image.visual_tokens,) if image else (),
        merge=_merge(image, spec.vision.visual_tokens) if image and spec.vision and spec.image_grid_pinpoints else None,
    )
    return build_batch([example] * step.micro_samples, pad_id=0, image_size=1)


def _merge(image: Division, tile_tokens: int) -> Merge:
    """All of its features in their order, then its newlines."""
    rows = torch.arange(image.visual_tokens)
    rows[image.visual_tokens - image.newlines :] = NEWLINE
    return Merge(rows, image.tiles * tile_tokens)


def on_device(batch: Batch, spec: ModelSpec, simulation: Simulation) -> Batch:
    """The batch with what only the device reads without memory. Labels stay: the host may divide them."""
    size = spec.vision.image_size if spec.vision else 1
    moved: dict[str, Any] = {
        "tokens": simulation.tensor(batch.tokens.shape, torch.int64),
        "positions": simulation.tensor(batch.positions.shape, torch.int64),
        "cu_seqlens": simulation.tensor(batch.cu_seqlens.shape, torch.int32),
        "pixels": simulation.tensor((len(batch.pixels), 3, size, size), torch.float32),
        "image_index": simulation.tensor(batch.image_index.shape, torch.int64),
    }
    if batch.feature_index is not None:
        moved["feature_index"] = simulation.tensor(batch.feature_index.shape, torch.int64)
    for tensor in moved.values():
        simulation.ledger.count(tensor)
    return replace(batch, **moved)
