"""`Example` and `Batch`: the only contract between data and model.

Shapes: T tokens, S samples, I images, P visual tokens an image, K supervised positions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Example:
    """One sample, tokenised and with its images decoded, before it is packed.

    Attributes:
        id: the record's id.
        tokens: [T] int64; the P positions of each image hold a pad id.
        supervised: [T] bool; True where the token is a target.
        image_starts: the first position of each image's P visual tokens.
        pixels: [I, 3, H, W] float32, or None without images.
        visual_tokens: P.
    """

    id: str
    tokens: Tensor
    supervised: Tensor
    image_starts: tuple[int, ...]
    pixels: Tensor | None
    visual_tokens: int

    @property
    def length(self) -> int:
        return self.tokens.numel()

    @property
    def image_tokens(self) -> int:
        """Positions of images."""
        return len(self.image_starts) * self.visual_tokens

    @property
    def num_labels(self) -> int:
        """Supervised positions that have a predecessor to predict them."""
        return int(self.supervised[1:].sum())


@dataclass(frozen=True)
class Counts:
    """What a batch holds, known on the host before the step."""

    text_tokens: int = 0
    image_tokens: int = 0
    label_tokens: int = 0
    pad_tokens: int = 0
    samples: int = 0
    images: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def tokens(self) -> int:
        """Text and image tokens, without padding."""
        return self.text_tokens + self.image_tokens


@dataclass(frozen=True)
class Labelled:
    """How many supervised tokens there are, and in how many samples and micro-batches: what a loss takes means over."""

    tokens: int = 0
    samples: int = 0
    batches: int = 0

    def __add__(self, other: Labelled) -> Labelled:
        return Labelled(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @classmethod
    def of(cls, batches: Iterable[Batch]) -> Labelled:
        """Of these micro-batches."""
        found = [[count for count in batch.labels_per_sample if count] for batch in batches]
        return cls(sum(map(sum, found)), sum(map(len, found)), sum(map(bool, found)))


@dataclass(frozen=True)
class Batch:
    """One micro-batch: samples laid end to end, each attending only to itself.

    A padded batch is the special case in which every sample was lengthened to the longest one.

    Attributes:
        tokens: [T] int64; image slots hold a pad id.
        positions: [T] int64; restart at 0 with each sample.
        cu_seqlens: [S+1] int32; sample boundaries.
        cu_seqlens_host: the same on the host.
        pixels: [I, 3, H, W] float32; never empty: one zero image, used by no token, when there is none.
        image_index: [V] int64; where each visual token goes, V = P × real images.
        label_index: [K] int64; the position that predicts each target.
        targets: [K] int64; the token ids to predict.
        labels_per_sample: K split over the S samples; padding at the end that is a sample of its own has no entry.
        counts: host-side counts.
        ids: the records' ids, for messages.
    """

    tokens: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    cu_seqlens_host: tuple[int, ...]
    pixels: Tensor
    image_index: Tensor
    label_index: Tensor
    targets: Tensor
    labels_per_sample: tuple[int, ...]
    counts: Counts
    ids: tuple[str, ...]

    def to(self, device: torch.device) -> Batch:
        """The batch with every tensor on `device`; copies do not wait for the device."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in values.items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)
