"""An image to the tensor that the vision tower reads; the same for training and generation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llava_core.data.cropped_resize import exact_columns
from llava_core.data.image_config import BICUBIC, CLIP_MEAN, CLIP_STD, Triple, folder_config, parsed, size_dict
from llava_core.data.image_store import MAX_WORKING_PIXELS, check_size
from llava_core.data.tiles import Anyres, DynamicTiles, Size, Tiling
from llava_core.errors import ConfigError

Aspect = Literal["square", "pad"]


@dataclass(frozen=True)
class ImageProcessor:
    """From an RGB image to the vision tower's input, bit-equal to transformers' PIL image processors.

    Sizes are (height, width), as in Hugging Face's configs.

    Attributes:
        resize: the shortest edge in pixels, keeping the aspect ratio; or an exact size; None: not resized.
        crop: the size of the centre crop, black where the image is smaller; None: not cropped.
        resample: Pillow's number of the resampling filter.
        mean: per channel, on the rescaled range; `pad` also takes its colour from it.
        std: per channel.
        rescale_factor: multiplies the levels 0…255.
        tiling: how an image is divided, each tile then processed as an image of its own; None: it is not.
        aspect: `square` processes the image as it is; `pad` first centres it on a square of colour int(mean * 255),
            as LLaVA-1.5's second stage does (the original's train.py:702-716).

    Raises:
        ConfigError: values that cannot be honoured, or an output without a fixed size.
    """

    resize: int | Size | None
    crop: Size | None
    resample: int = BICUBIC
    mean: Triple = CLIP_MEAN
    std: Triple = CLIP_STD
    rescale_factor: float = 1 / 255
    aspect: Aspect = "square"
    tiling: Tiling | None = None

    def __post_init__(self) -> None:
        if self.crop is None and not isinstance(self.resize, tuple):
            how = "no resizing" if self.resize is None else f"a shortest edge of {self.resize}"
            raise ConfigError(
                f"{how} without a crop gives images of varying size; "
                "the tower needs one size: set crop, or resize to an exact (height, width)"
            )
        if self.resample not in range(6):
            raise ConfigError(f"resample={self.resample} is not one of Pillow's filters, 0 (nearest) to 5 (hamming)")
        if 0 in self.std:
            raise ConfigError(f"image_std={self.std} holds a zero, by which nothing can be divided")
        if self.aspect not in ("square", "pad"):
            raise ConfigError(f"aspect={self.aspect!r} is neither 'square' nor 'pad'")
        if self.aspect == "pad" and not all(0 <= level <= 1 for level in self.mean):
            raise ConfigError(f"aspect='pad' takes its colour from image_mean: it must lie in 0…1, not be {self.mean}")
        if self.tiling is not None:
            self._check_tiling(self.tiling)

    @classmethod
    def from_folder(cls, path: Path, aspect: Aspect | None = None) -> ImageProcessor:
        """The processor of a Hugging Face folder; see `from_config`.

        Raises:
            ConfigError: it has none, or one with something that cannot be honoured.
        """
        config = folder_config(path)
        try:
            return cls.from_config(config, aspect)
        except ConfigError as error:
            raise ConfigError(f"the image processor config in {path}: {error}") from error

    @classmethod
    def from_config(cls, config: Mapping[str, Any], aspect: Aspect | None = None) -> ImageProcessor:
        """The processor that a Hugging Face image processor config describes.

        Args:
            aspect: in place of the config's own; images are whole then.

        Raises:
            ConfigError: naming what cannot be honoured.
        """
        fields = parsed(config)
        return cls(**(fields if aspect is None else {**fields, "aspect": aspect, "tiling": None}))

    def to_config(self) -> dict[str, Any]:
        """An export's `preprocessor_config.json`, from which transformers builds an equal processor."""
        exact = size_dict(self.resize if isinstance(self.resize, tuple) else self.output_size)
        config: dict[str, Any] = {
            "processor_class": "LlavaProcessor",
            "image_processor_type": "CLIPImageProcessor" if self.crop else "SiglipImageProcessor",
            **{"do_convert_rgb": True, "do_resize": self.resize is not None, "do_rescale": True, "do_normalize": True},
            "size": {"shortest_edge": self.resize} if isinstance(self.resize, int) else exact,
            "resample": self.resample,
            "do_center_crop": self.crop is not None,
            # Written even if not used: LlavaProcessor counts the image tokens from it.
            "crop_size": size_dict(self.output_size),
            "rescale_factor": self.rescale_factor,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        if self.aspect == "pad":
            config |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
        if isinstance(self.tiling, Anyres):
            config |= {
                "processor_class": "LlavaNextProcessor",
                "image_processor_type": "LlavaNextImageProcessor",
                "image_grid_pinpoints": [list(point) for point in self.tiling.pinpoints],
                "do_pad": True,
            }
        if isinstance(self.tiling, DynamicTiles):
            config |= {
                "image_processor_type": "GotOcr2ImageProcessor",
                "crop_to_patches": True,
                "min_patches": self.tiling.min_tiles,
                "max_patches": self.tiling.max_tiles,
            }
        return config

    @property
    def output_size(self) -> Size:
        """(height, width) of every output."""
        return self.crop or cast(Size, self.resize)

    def tiles(self, image: Image.Image) -> Tensor:
        """[I, 3, H, W] float32: the image's tiles, or the image as its only one.

        Raises:
            BadRow, ValueError: as for one image.
        """
        views = [image]
        if self.tiling is not None:
            views = self.tiling.views(image, self.output_size[0], Image.Resampling(self.resample))
        return torch.stack([self(view) for view in views])

    def __call__(self, image: Image.Image) -> Tensor:
        """[3, H, W] float32: an undivided image.

        Raises:
            BadRow: `image_too_large`, when its aspect ratio is so extreme that the way there exceeds
                MAX_WORKING_PIXELS.
            ValueError: the image is not RGB.
        """
        if image.mode != "RGB":
            raise ValueError(f"the image is in mode {image.mode}, expected RGB; convert it, as ImageStore.open does")
        if self.aspect == "pad":
            image = self._expand_to_square(image)
        levels = np.asarray(self._resize_and_crop(image))
        pixels = np.empty((3, *self.output_size), np.float32)
        for channel, table in enumerate(self._tables):
            # mode="clip": the default mode goes through a buffer. Levels cannot exceed 255.
            np.take(table, levels[:, :, channel], out=pixels[channel], mode="clip")
        return torch.from_numpy(pixels)

    @cached_property
    def _tables(self) -> np.ndarray:
        """[3, 256] float32: the output for each level of each channel.

        The casts are transformers' own, in its order: rescaled in float64, then float32, in which mean and std are
        applied (image_transforms.py: rescale, normalize).
        """
        levels = (np.arange(256, dtype=np.float64) * self.rescale_factor).astype(np.float32)
        mean, std = (np.array(values, dtype=np.float32)[:, None] for values in (self.mean, self.std))
        return (levels - mean) / std

    def _check_tiling(self, tiling: Tiling) -> None:
        """A tile must come through `__call__` as it is."""
        tile = self.output_size[0]
        sizes = {tile, *self.output_size, *(self.resize if isinstance(self.resize, tuple) else [self.resize or tile])}
        if self.aspect != "square" or sizes != {tile}:
            raise ConfigError(
                "tiles are square and not padded: expected one number for size and crop_size, not "
                f"resize={self.resize}, crop={self.crop}, aspect={self.aspect!r}"
            )
        if isinstance(tiling, Anyres):
            tiling.check(tile)

    def _expand_to_square(self, image: Image.Image) -> Image.Image:
        side = max(image.size)
        check_size(f"the square around {image.width} x {image.height}", (side, side), MAX_WORKING_PIXELS)
        square = Image.new("RGB", (side, side), tuple(int(level * 255) for level in self.mean))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square

    def _resize_and_crop(self, image: Image.Image) -> Image.Image:
        width, height = self._resized_size(image.width, image.height)
        check_size(f"{image.width} x {image.height} resized", (width, height), MAX_WORKING_PIXELS)
        crop_height, crop_width = self.output_size
        left, top = (width - crop_width) // 2, (height - crop_height) // 2
        if isinstance(self.resize, int) and self.resample == BICUBIC and left > 0 and height == crop_height:
            columns = exact_columns(image.width, width, left, crop_width)
            if columns is not None:
                box = (columns[0], 0, columns[1], image.height)
                return image.resize((crop_width, crop_height), Image.Resampling.BICUBIC, box=box)
        if self.resize is not None:
            image = image.resize((width, height), Image.Resampling(self.resample))
        if (width, height) == (crop_width, crop_height):
            return image
        return image.crop((left, top, left + crop_width, top + crop_height))

    def _resized_size(self, width: int, height: int) -> Size:
        """(width, height) after resizing; the long edge is rounded down."""
        if self.resize is None:
            return width, height
        if isinstance(self.resize, tuple):
            return self.resize[1], self.resize[0]
        if width <= height:
            return self.resize, int(self.resize * height / width)
        return int(self.resize * width / height), self.resize
