"""Where a model comes from: one Hugging Face folder, or a vision folder, a language folder and a projector."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llava_core.data.tiles import Anyres, Size
from llava_core.errors import WeightsError
from llava_core.model.adapters import Adapters
from llava_core.model.spec import ModelSpec, TextSpec
from llava_core.weights import internlm2, names
from llava_core.weights.folder import WeightsFolder, weight_files
from llava_core.weights.hf_config import (
    FeatureSelect,
    check_projector,
    model_spec,
    read_config,
    text_spec,
    vision_spec,
)
from llava_core.weights.internlm2 import RemoteCode
from llava_core.weights.names import Naming
from llava_core.weights.rows import Sliceable


@dataclass(frozen=True)
class ModelFolders:
    """What of a model its data depends on.

    Attributes:
        spec: its numbers.
        tokenizer: the folder with its tokenizer.
        processor: the folder with its image processor; None for a language model.
    """

    spec: ModelSpec
    tokenizer: Path
    processor: Path | None


@dataclass(frozen=True)
class ModelSource:
    """A model that has not been loaded yet.

    Attributes:
        spec: its numbers.
        tensors: a loader for each of this library's parameter names.
        tokenizer_folder: the folder with its tokenizer.
        processor_folder: the folder with its image processor; None for a language model.
        files: every weights file, for fingerprints.
        fresh_projector: the projector has no weights yet and is to be initialised.
        fresh_newline: the same of LLaVA-NeXT's newline alone, beside a projector that has weights.
        remote: what an export takes over from a language model's folder whose classes are not transformers' own.
        adapters: what is to be put beside the weights; where `tensors` has no values for it, it starts afresh.
    """

    spec: ModelSpec
    tensors: Mapping[str, Callable[[], Sliceable]]
    tokenizer_folder: Path
    processor_folder: Path | None
    files: tuple[Path, ...]
    fresh_projector: bool = False
    fresh_newline: bool = False
    remote: RemoteCode | None = None
    adapters: Adapters | None = None

    @property
    def folders(self) -> ModelFolders:
        """What of it is known without its weights."""
        return ModelFolders(self.spec, self.tokenizer_folder, self.processor_folder)


def from_folder(folder: Path) -> ModelSource:
    """A whole LLaVA, or a language model."""
    spec = folder_spec(folder)
    files = tuple(weight_files(folder))
    if spec.vision is not None:
        tensors = _tensors(folder, names.LLAVA, tied=spec.text.tied_embeddings)
        return ModelSource(spec, tensors, folder, folder, files)
    remote = RemoteCode.of(folder) if spec.text.family == "internlm2" else None
    return ModelSource(spec, _language_tensors(folder, spec.text), folder, None, files, remote=remote)


def compose(
    vision: Path,
    language: Path,
    projector: Path | None,
    *,
    projector_type: str,
    feature_layer: int,
    feature_select: FeatureSelect,
    image_grid_pinpoints: tuple[Size, ...] = (),
) -> ModelSource:
    """A LLaVA from its parts. Without `projector` its parameters are left for the loader to initialise, and so is the
    newline of a LLaVA-NeXT that `projector` does not have."""
    spec = composed_spec(
        vision,
        language,
        projector_type=projector_type,
        feature_layer=feature_layer,
        feature_select=feature_select,
        image_grid_pinpoints=image_grid_pinpoints,
    )
    tensors = _tensors(vision, names.VISION) | _language_tensors(language, spec.text)
    paths = [vision, language]
    if projector is not None:
        check_projector(projector, projector_type)
        tensors |= _tensors(projector, names.PROJECTOR)
        paths.append(projector)
    files = tuple(file for path in paths for file in weight_files(path))
    fresh_newline = bool(image_grid_pinpoints) and names.NEWLINE not in tensors
    return ModelSource(
        spec, tensors, language, vision, files, fresh_projector=projector is None, fresh_newline=fresh_newline
    )


def folder_spec(folder: Path) -> ModelSpec:
    """The numbers of a whole folder, from its config alone."""
    return model_spec(read_config(folder), folder)


def composed_spec(
    vision: Path,
    language: Path,
    *,
    projector_type: str,
    feature_layer: int,
    feature_select: FeatureSelect,
    image_grid_pinpoints: tuple[Size, ...] = (),
) -> ModelSpec:
    """The numbers of a LLaVA from its parts, from their configs alone."""
    text = text_spec(read_config(language), language)
    tower = vision_spec(read_config(vision), vision, feature_layer, feature_select)
    if image_grid_pinpoints:
        Anyres(image_grid_pinpoints).check(tower.image_size)
    return ModelSpec(text, tower, projector_type, image_grid_pinpoints=image_grid_pinpoints)


def _language_tensors(path: Path, spec: TextSpec) -> dict[str, Callable[[], Sliceable]]:
    tied = spec.tied_embeddings
    if spec.family == "internlm2":
        return internlm2.split_fused(_tensors(path, names.INTERNLM2, tied=tied), spec)
    return _tensors(path, names.LANGUAGE, tied=tied)


def _tensors(path: Path, naming: Naming, *, tied: bool = False) -> dict[str, Callable[[], Sliceable]]:
    folder = WeightsFolder(path)
    found: dict[str, Callable[[], Sliceable]] = {}
    origin: dict[str, str] = {}
    for disk_name in folder:
        name = naming.canonical(disk_name)
        if name is None or (tied and name == "language_model.lm_head.weight"):
            continue  # a tied head is the embedding: some releases write it twice
        if name in found:
            raise WeightsError(f"{path}: {disk_name!r} and {origin[name]!r} are both {name!r}.")
        found[name], origin[name] = partial(folder.__getitem__, disk_name), disk_name
    return found
