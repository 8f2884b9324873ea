"""An image to the tensor that the vision tower reads; the same for training and generation."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llava_core.data.image_store import MAX_WORKING_PIXELS, check_size
from llava_core.errors import ConfigError

Aspect = Literal["square", "pad"]
Triple = tuple[float, float, float]
Size = tuple[int, int]

CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)
BICUBIC = int(Image.Resampling.BICUBIC)

# The keys that are honoured, with the defaults of transformers' CLIP and LLaVA processors, and where SigLIP's differ.
DEFAULTS: Mapping[str, Any] = {
    "size": {"shortest_edge": 224},
    "resample": BICUBIC,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "rescale_factor": 1 / 255,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    "do_pad": False,
}
SIGLIP_DEFAULTS = {"size": {"height": 224, "width": 224}, "do_center_crop": False, "image_mean": 0.5, "image_std": 0.5}
# The keys of which only one value is honoured.
FIXED = {"do_resize": True, "do_rescale": True, "do_normalize": True, "default_to_square": False}
# The keys that do not change the pixels of an RGB image: names, and arguments of transformers' call.
NAMES = {"processor_class", "image_processor_type", "feature_extractor_type", "_valid_processor_keys"}
CALL_KEYS = {"do_convert_rgb", "return_tensors", "data_format", "input_data_format", "device", "disable_grouping"}


@dataclass(frozen=True)
class ImageProcessor:
    """From an RGB image to the vision tower's input, bit-equal to transformers' PIL image processors.

    Sizes are (height, width), as in Hugging Face's configs.

    Attributes:
        resize: the shortest edge in pixels, keeping the aspect ratio; or an exact size.
        crop: the size of the centre crop, black where the image is smaller; None: not cropped.
        resample: Pillow's number of the resampling filter.
        mean: per channel, on the rescaled range; `pad` also takes its colour from it.
        std: per channel.
        rescale_factor: multiplies the levels 0…255.
        aspect: `square` processes the image as it is; `pad` first centres it on a square of colour int(mean * 255),
            as LLaVA-1.5's second stage does (the original's train.py:702-716).

    Raises:
        ConfigError: values that cannot be honoured, or an output without a fixed size.
    """

    resize: int | Size
    crop: Size | None
    resample: int = BICUBIC
    mean: Triple = CLIP_MEAN
    std: Triple = CLIP_STD
    rescale_factor: float = 1 / 255
    aspect: Aspect = "square"

    def __post_init__(self) -> None:
        if self.crop is None and isinstance(self.resize, int):
            raise ConfigError(
                f"a shortest edge of {self.resize} without a crop gives images of varying size; "
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

    @classmethod
    def from_folder(cls, path: Path, aspect: Aspect | None = None) -> ImageProcessor:
        """The processor of a Hugging Face folder, in the form of transformers 5 (the `image_processor` of
        `processor_config.json`) or else of 4; `aspect` None takes the folder's own `do_pad`.

        Raises:
            ConfigError: neither file is there, or the config has something that cannot be honoured.
        """
        nested = _read_json(path / "processor_config.json").get("image_processor")
        config = nested or _read_json(path / "preprocessor_config.json")
        if not isinstance(config, dict) or not config:
            raise ConfigError(
                f"{path} has no image processor: neither preprocessor_config.json nor an image_processor in "
                "processor_config.json; copy preprocessor_config.json from the checkpoint or its vision tower"
            )
        try:
            return cls.from_config(config, aspect)
        except ConfigError as error:
            raise ConfigError(f"the image processor config in {path}: {error}") from error

    @classmethod
    def from_config(cls, config: Mapping[str, Any], aspect: Aspect | None = None) -> ImageProcessor:
        """The processor that a Hugging Face image processor config describes; a key that is null counts as absent.

        Raises:
            ConfigError: naming what cannot be honoured.
        """
        name = config.get("image_processor_type") or config.get("feature_extractor_type")
        kind = re.fullmatch("(CLIP|Llava|Siglip)(ImageProcessor(Fast|Pil)?|FeatureExtractor)", str(name))
        if kind is None:
            raise ConfigError(f"image_processor_type={name!r} is not known; known: CLIP-, Llava-, SiglipImageProcessor")
        given = {key: value for key, value in config.items() if value is not None and key not in NAMES | CALL_KEYS}
        for key, value in FIXED.items():
            if given.pop(key, value) is not value:
                raise ConfigError(f"{key}={config[key]!r} is not supported, only {value} is")
        unknown = sorted(set(given) - set(DEFAULTS))
        if unknown:
            raise ConfigError(f"{unknown} not understood; known: {sorted(DEFAULTS)}")
        values = {**DEFAULTS, **(SIGLIP_DEFAULTS if kind[1] == "Siglip" else {}), **given}
        pad, cropped = values["do_pad"], values["do_center_crop"]
        if not isinstance(pad, bool) or not isinstance(cropped, bool):
            raise ConfigError(f"do_pad={pad!r} and do_center_crop={cropped!r} must be true or false")
        if pad and kind[1] != "Llava":
            raise ConfigError(f"do_pad of a {name} pads its output, which is not supported; LlavaImageProcessor's is")
        crop = _parse_size("crop_size", values["crop_size"])
        return cls(
            resize=_parse_size("size", values["size"]),
            crop=((crop, crop) if isinstance(crop, int) else crop) if cropped else None,
            resample=values["resample"],
            mean=_parse_triple("image_mean", values["image_mean"]),
            std=_parse_triple("image_std", values["image_std"]),
            rescale_factor=_parse_number("rescale_factor", values["rescale_factor"]),
            aspect=aspect or ("pad" if pad else "square"),
        )

    def to_config(self) -> dict[str, Any]:
        """An export's `preprocessor_config.json`, from which transformers builds an equal processor."""
        exact = isinstance(self.resize, tuple)
        config = {
            "processor_class": "LlavaProcessor",
            "image_processor_type": "CLIPImageProcessor" if self.crop else "SiglipImageProcessor",
            **{"do_convert_rgb": True, "do_resize": True, "do_rescale": True, "do_normalize": True},
            "size": _size_dict(cast(Size, self.resize)) if exact else {"shortest_edge": self.resize},
            "resample": self.resample,
            "do_center_crop": self.crop is not None,
            # Written even if not used: LlavaProcessor counts the image tokens from it.
            "crop_size": _size_dict(self.output_size),
            "rescale_factor": self.rescale_factor,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        if self.aspect == "pad":
            config |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
        return config

    @property
    def output_size(self) -> Size:
        """(height, width) of every output."""
        return self.crop or cast(Size, self.resize)

    def __call__(self, image: Image.Image) -> Tensor:
        """[3, H, W] float32.

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
        image = image.resize((width, height), Image.Resampling(self.resample))
        if (width, height) == (crop_width, crop_height):
            return image
        return image.crop((left, top, left + crop_width, top + crop_height))

    def _resized_size(self, width: int, height: int) -> Size:
        """(width, height) after resizing; the long edge is rounded down."""
        if isinstance(self.resize, tuple):
            return self.resize[1], self.resize[0]
        if width <= height:
            return self.resize, int(self.resize * height / width)
        return int(self.resize * width / height), self.resize


@lru_cache(maxsize=4096)
def exact_columns(size: int, resized: int, left: int, crop: int) -> tuple[float, float] | None:
    """The columns of an image `size` wide to hand to `resize(box=…)`, to get columns `left` to `left + crop` of the
    image resized to `resized` wide, bit for bit; None where that is not certain.

    Certain is: (1) Pillow holds the box in float32, so both edges and their distance must be exact in it; a box that
    is off by 1e-5 of a pixel changes hundreds of levels. (2) Pillow computes where each output column lies by another
    sum, off by a few float64 roundings, before it rounds the weights to 22 bits: no weight may lie close to a tie.
    Only columns, because Pillow 13 chooses the order of its two passes by size: a box that cuts rows can change it.
    """
    edges = (Fraction(left * size, resized), Fraction((left + crop) * size, resized))
    if any(Fraction(float(np.float32(float(exact)))) != exact for exact in (*edges, edges[1] - edges[0])):
        return None
    scaled = np.abs(_bicubic_weights(size, resized, left, crop)) * 2**22
    # float64 errs by 1e-13 of a pixel here, 1e-6 of the rounding step.
    if np.any(np.abs(scaled % 1 - 0.5) < 1e-5):
        return None
    return float(edges[0]), float(edges[1])


def _bicubic_weights(size: int, resized: int, left: int, crop: int) -> np.ndarray:
    """[crop, taps] float64: the weights with which Pillow's bicubic filter (a = -1/2) sums input columns."""
    scale = size / resized
    stretch = max(scale, 1.0)
    centers = ((np.arange(left, left + crop) + 0.5) * scale)[:, None]
    columns = np.floor(centers - 2 * stretch) + np.arange(int(4 * stretch) + 3)
    x = np.abs(columns + 0.5 - centers) / stretch
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0)) * ((columns >= 0) & (columns < size))
    return weights / weights.sum(axis=1, keepdims=True)


def _read_json(path: Path) -> dict[str, Any]:
    """The file's object; empty if there is no file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def _size_dict(size: Size) -> dict[str, int]:
    return {"height": size[0], "width": size[1]}


def _parse_size(key: str, value: object) -> int | Size:
    """A number, for `size` the shortest edge and for `crop_size` both; or (height, width)."""
    if not isinstance(value, Mapping):
        return _parse_count(key, value)
    if key == "size" and set(value) == {"shortest_edge"}:
        return _parse_count(key, value["shortest_edge"])
    if set(value) != {"height", "width"}:
        raise ConfigError(f"{key}={dict(value)} is not understood; known: a number, shortest_edge, height and width")
    return _parse_count(key, value["height"]), _parse_count(key, value["width"])


def _parse_number(key: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ConfigError(f"{key}={value!r} must be a number")
    return value


def _parse_count(key: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{key}={value!r} must be a whole number, at least 1")
    return value


def _parse_triple(key: str, value: object) -> Triple:
    values = value if isinstance(value, list | tuple) else [value] * 3
    if len(values) != 3:
        raise ConfigError(f"{key}={value!r} must be one number or three, one per channel")
    red, green, blue = (_parse_number(key, number) for number in values)
    return red, green, blue
