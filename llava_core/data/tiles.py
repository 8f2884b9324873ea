"""How an image is divided into tiles, which the vision tower reads one by one.

Sizes are (height, width). A tile is square, and gives a square of features, row by row.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from llava_core.data.batch import NEWLINE, Merge
from llava_core.errors import ConfigError

Size = tuple[int, int]


class Division(NamedTuple):
    """What an image may become.

    Attributes:
        visual_tokens: newlines among them.
    """

    tiles: int
    visual_tokens: int
    newlines: int


class Tiling(ABC):
    """A rule by which images are divided."""

    @abstractmethod
    def views(self, image: Image.Image, tile: int, resample: Image.Resampling) -> list[Image.Image]:
        """The tiles of an RGB image, `tile` pixels high and wide, in the tower's order."""

    @abstractmethod
    def visual_tokens(self, size: Size, tile: int, tile_tokens: int) -> int:
        """How many an image of this size becomes, where each tile gives `tile_tokens` features."""

    @abstractmethod
    def merge(self, size: Size, tile: int, tile_tokens: int) -> Merge | None:
        """What the features of its tiles become; None where they follow one another."""

    @abstractmethod
    def divisions(self, tile: int, tile_tokens: int) -> tuple[Division, ...]:
        """The largest of every number of tiles that an image may become."""


@dataclass(frozen=True)
class Anyres(Tiling):
    """LLaVA-NeXT's: the whole image as a tile, then those of the image at the best of several resolutions, which it is
    fitted into with black around it.

    The features of the latter are one picture. The rows or columns that lie in the black are dropped, and a newline
    ends each row.

    Attributes:
        pinpoints: the resolutions, multiples of a tile.

    Source: in transformers `select_best_resolution` and `get_patch_output_size` (image_processing_utils.py),
    `LlavaNextImageProcessorPil`, and `pack_image_features` (modeling_llava_next.py).
    """

    pinpoints: tuple[Size, ...]

    def check(self, tile: int) -> None:
        """Raises ConfigError for resolutions that `tile` does not divide."""
        uneven = [list(point) for point in self.pinpoints if point[0] % tile or point[1] % tile]
        if uneven or not self.pinpoints:
            raise ConfigError(
                f"image_grid_pinpoints = {uneven or []}: expected one or more (height, width), multiples of the "
                f"tower's {tile} pixels"
            )

    def resolution(self, size: Size) -> Size:
        """The one at which most of the image's pixels are kept; of several the one with the least black."""

        def kept(point: Size) -> int:
            scale = min(point[1] / size[1], point[0] / size[0])
            return min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])

        return max(self.pinpoints, key=lambda point: (kept(point), kept(point) - point[0] * point[1]))

    def views(self, image: Image.Image, tile: int, resample: Image.Resampling) -> list[Image.Image]:
        height, width = self.resolution((image.height, image.width))
        by_width, by_height = width / image.width, height / image.height
        if by_width < by_height:
            fitted = (width, min(math.ceil(image.height * by_width), height))
        else:
            fitted = (min(math.ceil(image.width * by_height), width), height)
        canvas = Image.new("RGB", (width, height))
        canvas.paste(image.resize(fitted, resample), ((width - fitted[0]) // 2, (height - fitted[1]) // 2))
        return [image.resize((tile, tile), resample), *_cut(canvas, tile)]

    def visual_tokens(self, size: Size, tile: int, tile_tokens: int) -> int:
        top, left, (rows, columns) = self._margins(size, tile, math.isqrt(tile_tokens))
        return tile_tokens + (rows - 2 * top) * (columns - 2 * left + 1)

    def merge(self, size: Size, tile: int, tile_tokens: int) -> Merge:
        side = math.isqrt(tile_tokens)
        top, left, (rows, columns) = self._margins(size, tile, side)
        by_tile = np.arange(rows * columns).reshape(rows // side, columns // side, side, side) + tile_tokens
        picture = by_tile.transpose(0, 2, 1, 3).reshape(rows, columns)[top : rows - top, left : columns - left]
        lines = np.pad(picture, ((0, 0), (0, 1)), constant_values=NEWLINE)
        found = np.concatenate((np.arange(tile_tokens), lines.ravel()))
        return Merge(torch.from_numpy(found), tile_tokens + rows * columns)

    def divisions(self, tile: int, tile_tokens: int) -> tuple[Division, ...]:
        side = math.isqrt(tile_tokens)
        grids = [(height // tile, width // tile) for height, width in self.pinpoints]
        return tuple(
            Division(1 + rows * columns, tile_tokens + rows * side * (columns * side + 1), rows * side)
            for rows, columns in grids
        )

    def _margins(self, size: Size, tile: int, side: int) -> tuple[int, int, Size]:
        """Rows above and below and columns left and right that lie in the black, and how many there are in all."""
        height, width = self.resolution(size)
        rows, columns = height // tile * side, width // tile * side
        # The casts are transformers' own: another order of these divisions gives another number for some sizes.
        if size[1] / size[0] > columns / rows:
            return (rows - int(round(size[0] * (columns / size[1]), 7))) // 2, 0, (rows, columns)
        return 0, (columns - int(round(size[1] * (rows / size[0]), 7))) // 2, (rows, columns)


@dataclass(frozen=True)
class DynamicTiles(Tiling):
    """InternVL's: the image is stretched over the grid of tiles whose aspect ratio is nearest to its own; where it has
    more than one, the whole image follows as another.

    Attributes:
        min_tiles, max_tiles: of the grid.

    Source: `GotOcr2ImageProcessorPil.crop_image_to_patches` of transformers; `dynamic_preprocess` of InternVL.
    """

    min_tiles: int
    max_tiles: int

    def __post_init__(self) -> None:
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise ConfigError(f"min_tiles = {self.min_tiles}, max_tiles = {self.max_tiles}: expected 1 ≤ min ≤ max")

    def grid(self, size: Size, tile: int) -> Size:
        """(rows, columns); of equally near grids the largest that the image, doubled, fills."""
        ratio, area = size[1] / size[0], size[0] * size[1]
        best, nearest = (1, 1), math.inf
        for rows, columns in self._grids():
            distance = abs(ratio - columns / rows)
            if distance < nearest or (distance == nearest and area > 0.5 * tile * tile * rows * columns):
                best, nearest = (rows, columns), distance
        return best

    def views(self, image: Image.Image, tile: int, resample: Image.Resampling) -> list[Image.Image]:
        rows, columns = self.grid((image.height, image.width), tile)
        tiles = list(_cut(image.resize((columns * tile, rows * tile), resample), tile))
        return tiles if len(tiles) == 1 else [*tiles, image.resize((tile, tile), resample)]

    def visual_tokens(self, size: Size, tile: int, tile_tokens: int) -> int:
        return _with_whole(math.prod(self.grid(size, tile))) * tile_tokens

    def merge(self, size: Size, tile: int, tile_tokens: int) -> None:
        return None

    def divisions(self, tile: int, tile_tokens: int) -> tuple[Division, ...]:
        counts = [_with_whole(count) for count in range(self.min_tiles, self.max_tiles + 1)]
        return tuple(Division(count, count * tile_tokens, 0) for count in counts)

    def _grids(self) -> list[Size]:
        """Those with fewer tiles first; of equally many, narrow ones first."""
        sides = range(1, self.max_tiles + 1)
        grids = [(rows, columns) for columns in sides for rows in sides]
        return sorted((grid for grid in grids if self.min_tiles <= math.prod(grid) <= self.max_tiles), key=math.prod)


def _with_whole(tiles: int) -> int:
    return tiles if tiles == 1 else tiles + 1


def _cut(image: Image.Image, tile: int) -> Iterator[Image.Image]:
    """The tiles row by row."""
    for top in range(0, image.height, tile):
        for left in range(0, image.width, tile):
            yield image.crop((left, top, left + tile, top + tile))
