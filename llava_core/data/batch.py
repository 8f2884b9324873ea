"""`Example` and `Batch`: the only contract between data and model.

The vision tower reads tiles: an image is one, or is divided into several. Each tile gives P features, and an image's
visual tokens are those of its tiles one after the other, or what `Merge` makes of them.

Shapes: T tokens, S samples, I tiles, P features a tile, V visual tokens, K supervised positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

NEWLINE = -1
"""In `Merge.rows`: the model's newline, which is no tile's feature."""


@dataclass(frozen=True)
class Merge:
    """How the features of tiles become visual tokens, where they do not simply follow one another.

    Attributes:
        rows: [V] int64; which of the tiles' features each visual token is, or NEWLINE.
        num_features: of all these tiles.
    """

    rows: Tensor
    num_features: int

    @classmethod
    def joined(cls, merges: Sequence[Merge]) -> Merge:
        """Of tiles that follow one another."""
        starts = [0, *accumulate(merge.num_features for merge in merges)]
        rows = [
            torch.where(merge.rows == NEWLINE, NEWLINE, merge.rows + start)
            for merge, start in zip(merges, starts, strict=False)
        ]
        return cls(torch.cat(rows), starts[-1])


@dataclass(frozen=True)
class Example:
    """One sample, tokenised and with its images decoded, before it is packed.

    Attributes:
        id: the record's id.
        tokens: [T] int64; the visual tokens of each image hold a pad id.
        supervised: [T] bool; True where the token is a target.
        image_starts: the first position of each image.
        pixels: [I, 3, H, W] float32, the tiles of all images; or None without images.
        visual_tokens: of each image.
        merge: of all tiles; None where their features follow one another.
    """

    id: str
    tokens: Tensor
    supervised: Tensor
    image_starts: tuple[int, ...]
    pixels: Tensor | None
    visual_tokens: tuple[int, ...]
    merge: Merge | None = None

    @property
    def length(self) -> int:
        return self.tokens.numel()

    @property
    def image_tokens(self) -> int:
        """Positions of images."""
        return sum(self.visual_tokens)

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
    tiles: int = 0

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
        image_index: [V] int64; where each visual token goes; newlines come last.
        visual_tokens: V split over the images.
        feature_index: [F] int64; which of the I·P features each visual token is that is no newline; None where they
            are the first V, in their order.
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
    visual_tokens: tuple[int, ...]
    label_index: Tensor
    targets: Tensor
    labels_per_sample: tuple[int, ...]
    counts: Counts
    ids: tuple[str, ...]
    feature_index: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.cu_seqlens_host[-1]

    @property
    def image_starts(self) -> list[int]:
        """The first position of each image."""
        firsts = [0, *accumulate(self.visual_tokens)][:-1]
        return [int(slot) for slot in self.image_index.sort().values[firsts]]

    @property
    def num_newlines(self) -> int:
        """Visual tokens that are no tile's feature."""
        return 0 if self.feature_index is None else self.image_index.numel() - self.feature_index.numel()

    def to(self, device: torch.device) -> Batch:
        """The batch with every tensor on `device`; copies do not wait for the device."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in values.items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)
