"""What an image becomes: tiles for the tower, and visual tokens in a sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from llava_core.data.batch import Merge
from llava_core.data.images import ImageProcessor
from llava_core.data.tiles import Size
from llava_core.errors import BadRow


@dataclass(frozen=True)
class ImageSide:
    """How images become pixels and visual tokens.

    Attributes:
        tile_tokens: features that the tower gives of each tile.
    """

    processor: ImageProcessor
    tile_tokens: int

    def visual_tokens(self, read_size: Callable[[], Size]) -> int:
        """How many an image becomes; its (height, width) is only asked for where it matters."""
        return self.tile_tokens if self.processor.tiling is None else self._visual_tokens(read_size())

    def tiles(self, images: Sequence[Image.Image], visual_tokens: Sequence[int]) -> tuple[Tensor, Merge | None]:
        """The images' tiles [I, 3, H, W], and what their features become.

        Args:
            visual_tokens: of each image, as they were counted.

        Raises:
            BadRow: an image is another one than was counted, or cannot be resized.
        """
        sizes = [(image.height, image.width) for image in images]
        found = [self._visual_tokens(size) for size in sizes]
        if found != list(visual_tokens):
            raise BadRow(
                "broken_image",
                f"an image changed while the row was read: {sizes} pixels are not {list(visual_tokens)} visual tokens",
            )
        tiling = self.processor.tiling
        merges = [tiling.merge(size, self._tile, self.tile_tokens) for size in sizes] if tiling is not None else []
        found_merges = [merge for merge in merges if merge is not None]
        pixels = torch.cat([self.processor.tiles(image) for image in images])
        return pixels, Merge.joined(found_merges) if found_merges else None

    @property
    def _tile(self) -> int:
        return self.processor.output_size[0]

    def _visual_tokens(self, size: Size) -> int:
        tiling = self.processor.tiling
        return self.tile_tokens if tiling is None else tiling.visual_tokens(size, self._tile, self.tile_tokens)
