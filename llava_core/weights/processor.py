"""The image processor that goes with a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llava_core.data.images import Aspect, ImageProcessor
from llava_core.data.tiles import Anyres, DynamicTiles
from llava_core.errors import ConfigError
from llava_core.model.spec import ModelSpec


def load_processor(folder: Path, spec: ModelSpec, aspect: Aspect | DynamicTiles | None = None) -> ImageProcessor:
    """The image processor of a model's folder, or of its tower's.

    Args:
        aspect: in place of the folder's own; None for a LLaVA-NeXT, which has no other.

    Raises:
        ConfigError: the folder has none, or one that does not give what the tower takes, or none of that aspect.
    """
    assert spec.vision is not None
    if spec.image_grid_pinpoints:
        assert aspect is None
        processor = _anyres(folder, Anyres(spec.image_grid_pinpoints))
    elif isinstance(aspect, DynamicTiles):
        whole = ImageProcessor.from_folder(folder, "square")
        processor = replace(whole, resize=whole.output_size, crop=None, tiling=aspect)
    else:
        processor = _whole(folder, aspect)
    size = spec.vision.image_size
    if processor.output_size != (size, size):
        raise ConfigError(
            f"{folder}: its image processor gives {processor.output_size} pixels and the vision tower takes "
            f"{size} x {size}; mend preprocessor_config.json."
        )
    if processor.tiling is not None and spec.vision.visual_tokens != spec.vision.num_patches:
        raise ConfigError(
            "tiles are for features of patches alone: set model.vision_feature_select to default, which leaves the "
            "class token out, or image_aspect to square or pad."
        )
    return processor


def _whole(folder: Path, aspect: Aspect | None) -> ImageProcessor:
    """The processor of a model that is no LLaVA-NeXT, for the folder's own aspect or another without tiles."""
    own = ImageProcessor.from_folder(folder)
    if isinstance(own.tiling, Anyres):
        raise ConfigError(f"{folder}: its image processor is LLaVA-NeXT's, and its model is not.")
    if aspect == "square" and isinstance(own.tiling, DynamicTiles):
        raise ConfigError(
            f"{folder}: its image processor is for tiles and stretches an image to a square, where "
            "data.image_aspect = square would crop it; set data.image_aspect to pad, or to tiles with data.max_tiles."
        )
    return own if aspect is None else ImageProcessor.from_folder(folder, aspect)


def _anyres(folder: Path, tiling: Anyres) -> ImageProcessor:
    """A LLaVA-NeXT's processor; of a tower, as its images are processed whole."""
    own = ImageProcessor.from_folder(folder)
    if not isinstance(own.tiling, Anyres):
        return replace(ImageProcessor.from_folder(folder, "square"), tiling=tiling)
    if own.tiling != tiling:
        raise ConfigError(
            f"{folder}: image_grid_pinpoints are {own.tiling.pinpoints} in its image processor and "
            f"{tiling.pinpoints} in its model; mend one of them."
        )
    return own
