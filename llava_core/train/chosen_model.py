"""The model that a config names: with its weights, or as much of it as is needed without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_core.config.schema import ModelConfig
from llava_core.model.spec import ModelSpec
from llava_core.weights.source import ModelFolders, ModelSource, compose, composed_spec, folder_spec, from_folder


def open_model(config: ModelConfig) -> ModelSource:
    """The model with its weights. Raises WeightsError."""
    if config.path is not None:
        return from_folder(config.path)
    vision, language = _parts(config)
    return compose(vision, language, config.projector, **_joint(config))


def open_folders(config: ModelConfig) -> ModelFolders:
    """What the data depends on of it, without its weights. Raises WeightsError."""
    spec = open_spec(config)
    if config.path is not None:
        return ModelFolders(spec, config.path, config.path if spec.vision else None)
    vision, language = _parts(config)
    return ModelFolders(spec, language, vision)


def open_spec(config: ModelConfig) -> ModelSpec:
    """Its numbers, without its weights. Raises WeightsError."""
    if config.path is not None:
        return folder_spec(config.path)
    return composed_spec(*_parts(config), **_joint(config))


def _parts(config: ModelConfig) -> tuple[Path, Path]:
    """The folders that a composed model is made of."""
    assert config.vision is not None
    assert config.language is not None
    return config.vision, config.language


def _joint(config: ModelConfig) -> dict[str, Any]:
    """What joins them."""
    return {
        "projector_type": config.projector_type,
        "feature_layer": config.vision_feature_layer,
        "feature_select": config.vision_feature_select,
        "image_grid_pinpoints": config.image_grid_pinpoints,
    }
