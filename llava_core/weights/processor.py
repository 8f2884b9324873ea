"""The image processor that goes with a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llava_core.data.images import Aspect, ImageProcessor
from llava_core.data.tiles import Anyres, DynamicTiles
from llava_core.errors import ConfigError
from llava_core.model.spec import VisionSpec


def load_processor(folder: Path, vision: VisionSpec, aspect: Aspect | DynamicTiles | None = None) -> ImageProcessor:
    """The image processor of a model's folder.

    Args:
        aspect: in place of the folder's own.

    Raises:
        ConfigError: the folder has none, or one that does not give what the tower takes.
    """
    if isinstance(aspect, DynamicTiles):
        whole = ImageProcessor.from_folder(folder, "square")
        processor = replace(whole, resize=whole.output_size, crop=None, tiling=aspect)
    else:
        processor = ImageProcessor.from_folder(folder, aspect)
    if processor.output_size != (vision.image_size, vision.image_size):
        raise ConfigError(
            f"{folder}: its image processor gives {processor.output_size} pixels and the vision tower takes "
            f"{vision.image_size} x {vision.image_size}; mend preprocessor_config.json."
        )
    if processor.tiling is not None and vision.visual_tokens != vision.num_patches:
        raise ConfigError(
            "tiles are for features of patches alone: set model.vision_feature_select to default, which leaves the "
            "class token out, or image_aspect to square or pad."
        )
    if isinstance(processor.tiling, Anyres):
        raise ConfigError(f"{folder}: its image processor is LLaVA-NeXT's, and its model is not.")
    return processor
