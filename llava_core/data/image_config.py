"""Hugging Face's image processor configs: which keys are honoured, and what they say."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from llava_core.data.tiles import Anyres, DynamicTiles, Size, Tiling
from llava_core.errors import ConfigError

Triple = tuple[float, float, float]

CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)
BICUBIC = int(Image.Resampling.BICUBIC)

# The keys that are honoured, with the defaults of transformers' CLIP and LLaVA processors, and where others' differ.
DEFAULTS: Mapping[str, Any] = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "default_to_square": False,
    "size": {"shortest_edge": 224},
    "resample": BICUBIC,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "rescale_factor": 1 / 255,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    "do_pad": False,
}
OTHER_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "CLIP": {},
    "Llava": {},
    "Siglip": {
        "size": {"height": 224, "width": 224},
        "do_center_crop": False,
        "crop_size": None,
        "image_mean": 0.5,
        "image_std": 0.5,
    },
    "LlavaNext": {
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        "aspect_ratio_setting": "anyres",
        "do_pad": True,
    },
    "GotOcr2": {
        "size": {"height": 384, "width": 384},
        "do_center_crop": False,
        "crop_size": None,
        "crop_to_patches": False,
        "min_patches": 1,
        "max_patches": 12,
        "patch_size": None,  # for a processor that counts tokens by it
    },
}
SWITCHES = (
    "do_resize",
    "do_rescale",
    "do_normalize",
    "default_to_square",
    "do_center_crop",
    "do_pad",
    "crop_to_patches",
)
# The keys of which only one value is honoured.
FIXED = {"aspect_ratio_setting": "anyres", "data_format": "channels_first"}
# The keys that do not change the pixels of an RGB image: names, and arguments of transformers' call.
NAMES = {"processor_class", "image_processor_type", "feature_extractor_type", "_valid_processor_keys"}
CALL_KEYS = {"do_convert_rgb", "return_tensors", "input_data_format", "device", "disable_grouping"}


def folder_config(path: Path) -> dict[str, Any]:
    """The image processor config of a Hugging Face folder, in the form of transformers 5 (the `image_processor` of
    `processor_config.json`) or else of 4.

    Raises:
        ConfigError: neither file is there.
    """
    nested = _read_json(path / "processor_config.json").get("image_processor")
    config = nested or _read_json(path / "preprocessor_config.json")
    if not isinstance(config, dict) or not config:
        raise ConfigError(
            f"{path} has no image processor: neither preprocessor_config.json nor an image_processor in "
            "processor_config.json; copy preprocessor_config.json from the checkpoint or its vision tower"
        )
    return config


def parsed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ImageProcessor` as a config gives them; a key that is null counts as absent.

    Raises:
        ConfigError: naming what cannot be honoured.
    """
    kind, values = _values(config)
    _check_crop(kind, values)
    # LLaVA-NeXT's do_pad pads batches, in which images stay as they are.
    if values["do_pad"] and kind not in ("Llava", "LlavaNext"):
        raise ConfigError(
            f"do_pad of a {kind}ImageProcessor pads its output, which is not supported; LlavaImageProcessor's is"
        )
    pad = values["do_pad"] and kind == "Llava"
    if pad and not values["do_normalize"]:
        raise ConfigError("do_pad takes its colour from image_mean, so do_normalize=False is not supported beside it")
    size, crop = _parse_size("size", values["size"]), _parse_crop(values["crop_size"])
    if values["default_to_square"] and isinstance(values["size"], int):
        size = (values["size"], values["size"])
    return {
        "resize": size if values["do_resize"] else None,
        "crop": crop if values["do_center_crop"] else None,
        "resample": values["resample"],
        # Levels that are not rescaled or not normalized are the same numbers as with a factor, mean and std of these.
        "mean": _parse_triple("image_mean", values["image_mean"]) if values["do_normalize"] else (0.0, 0.0, 0.0),
        "std": _parse_triple("image_std", values["image_std"]) if values["do_normalize"] else (1.0, 1.0, 1.0),
        "rescale_factor": _parse_number("rescale_factor", values["rescale_factor"]) if values["do_rescale"] else 1.0,
        "aspect": "pad" if pad else "square",
        "tiling": _parse_tiling(kind, values),
    }


def _check_crop(kind: str, values: Mapping[str, Any]) -> None:
    """Refuses what transformers' processor of this kind fails at, or does not do.

    Raises:
        ConfigError: naming it.
    """
    crops, crop = values["do_center_crop"], _parse_crop(values["crop_size"])
    if kind == "GotOcr2" and crops:
        raise ConfigError("do_center_crop=True of a GotOcr2ImageProcessor does nothing in transformers; leave it out")
    if crops and crop is None:
        raise ConfigError(f"do_center_crop=True of a {kind}ImageProcessor needs a crop_size")
    if kind != "LlavaNext":
        return
    if not values["do_resize"]:
        raise ConfigError("do_resize=False of a LlavaNextImageProcessor is not supported: its whole image has any size")
    size = _parse_size("size", values["size"])
    # transformers takes the side of its tiles from crop_size, whether it crops or not.
    if not crops and crop != ((size, size) if isinstance(size, int) else size):
        raise ConfigError(
            f"crop_size={values['crop_size']!r} of a LlavaNextImageProcessor is the size of its tiles, so without "
            f"do_center_crop it must be that of size={values['size']!r}"
        )


def _values(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The kind of a processor, and every key with its default."""
    name = config.get("image_processor_type") or config.get("feature_extractor_type")
    kinds = "|".join(OTHER_DEFAULTS)
    match = re.fullmatch(f"({kinds})(ImageProcessor(Fast|Pil)?|FeatureExtractor)", str(name))
    if match is None:
        known = ", ".join(f"{kind}ImageProcessor" for kind in OTHER_DEFAULTS)
        raise ConfigError(f"image_processor_type={name!r} is not known; known: {known}")
    kind = match[1]
    given = {key: value for key, value in config.items() if value is not None and key not in NAMES | CALL_KEYS}
    for key, value in FIXED.items():
        if given.pop(key, value) != value:
            raise ConfigError(f"{key}={config[key]!r} is not supported, only {value!r} is")
    defaults = {**DEFAULTS, **OTHER_DEFAULTS[kind]}
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise ConfigError(f"{unknown} not understood; known: {sorted(defaults)}")
    values = {**defaults, **given}
    for key in SWITCHES:
        if not isinstance(values.get(key, False), bool):
            raise ConfigError(f"{key}={values[key]!r} must be true or false")
    return kind, values


def _parse_tiling(kind: str, values: Mapping[str, Any]) -> Tiling | None:
    if kind == "LlavaNext":
        return Anyres(parse_pinpoints(values["image_grid_pinpoints"]))
    if kind == "GotOcr2" and values["crop_to_patches"]:
        return DynamicTiles(*(_parse_count(key, values[key]) for key in ("min_patches", "max_patches")))
    return None


def parse_pinpoints(value: object) -> tuple[Size, ...]:
    """A config's `image_grid_pinpoints`. Raises ConfigError."""
    key = "image_grid_pinpoints"
    points = value if isinstance(value, list | tuple) else []
    if not points or any(not isinstance(point, list | tuple) or len(point) != 2 for point in points):
        raise ConfigError(f"{key}={value!r} must be a list of (height, width)")
    return tuple((_parse_count(key, height), _parse_count(key, width)) for height, width in points)


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


def size_dict(size: Size) -> dict[str, int]:
    return {"height": size[0], "width": size[1]}


def _parse_size(key: str, value: object) -> int | Size:
    """A number, for `size` the shortest edge and for `crop_size` both; or (height, width)."""
    if not isinstance(value, Mapping):
        return _parse_count(key, value)
    value = {edge: length for edge, length in value.items() if length is not None}
    if key == "size" and set(value) == {"shortest_edge"}:
        return _parse_count(key, value["shortest_edge"])
    if set(value) != {"height", "width"}:
        raise ConfigError(f"{key}={dict(value)} is not understood; known: a number, shortest_edge, height and width")
    return _parse_count(key, value["height"]), _parse_count(key, value["width"])


def _parse_crop(value: object) -> Size | None:
    """(height, width) of a `crop_size`; None where a processor has none."""
    crop = None if value is None else _parse_size("crop_size", value)
    return (crop, crop) if isinstance(crop, int) else crop


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
