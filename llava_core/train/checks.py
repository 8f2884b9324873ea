"""What can be found wrong with a run before any weight is read. Nothing here writes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from llava_core.config import RunConfig
from llava_core.config.data import DataConfig, SourceConfig
from llava_core.data.piece_template import template_file
from llava_core.data.readers import names_a_pair
from llava_core.data.records import IMAGE_MARK
from llava_core.engine.hardware import HOST, Hardware
from llava_core.engine.layout import Layout
from llava_core.errors import ConfigError
from llava_core.model.spec import ModelSpec
from llava_core.plugins import Registry

MAX_LISTED = 5


def check_paths(config: RunConfig) -> None:
    """Every path that the config names exists.

    Raises:
        ConfigError: listing each that does not.
    """
    named = {
        **{f"model.{key}": getattr(config.model, key) for key in ("path", "vision", "language", "projector")},
        "lora.path": config.lora.path if config.lora is not None else None,
        **_data_paths(config),
    }
    missing = [f"\n  {key} = {path}: no such file or folder" for key, path in named.items() if not _there(path)]
    if missing:
        raise ConfigError("the config names what is not there:" + "".join(missing))
    check_output(config.output)


def _data_paths(config: RunConfig) -> dict[str, Path | None]:
    data = config.data
    named = _source_paths("data", data)
    for number, source in enumerate(data.sources):
        named |= _source_paths(f"data.sources.{number}", source)
    validation = config.validation
    if validation is not None:
        named |= {"validation.path": validation.path, "validation.images": validation.images}
        for number, source in enumerate(validation.sources):
            named |= _source_paths(f"validation.sources.{number}", source)
    return named


def _source_paths(key: str, given: DataConfig | SourceConfig) -> dict[str, Path | None]:
    template = None if given.template is None else template_file(given.template)
    return {f"{key}.path": given.path, f"{key}.images": given.images, f"{key}.template": template}


def _there(path: Path | None) -> bool:
    return path is None or path.exists() or names_a_pair(path)


def check_output(folder: Path, given: str = "output =") -> None:
    """One may write into `folder`: it is one, or can be made. `given` is how the user names it.

    Raises:
        ConfigError: it is not, and why.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise ConfigError(f"{given} {folder}: {existing} is not a folder; name another output.")
    if not os.access(existing, os.W_OK):
        raise ConfigError(f"{given} {folder}: {existing} cannot be written to; name another output.")


def check_trackers(config: RunConfig, registry: Registry) -> None:
    """Each tracker that the config names is registered. Raises PluginError."""
    for name in config.log.trackers:
        registry.load("tracker", name)


def check_shares(config: RunConfig, layout: Layout) -> None:
    """Each process has something of each full step.

    Raises:
        ConfigError: a step has fewer samples, or padded micro-batches, than there are shares.
    """
    chunks = config.batch.global_size // (config.batch.micro_size or 1)
    if chunks < layout.data:
        unit = "samples" if config.batch.micro_size is None else f"micro-batches of {config.batch.micro_size}"
        raise ConfigError(
            f"batch.global_size = {config.batch.global_size}: {layout.data} data-parallel processes cannot share "
            f"{chunks} {unit} a step; raise it, or start fewer processes."
        )


def check_backend(config: RunConfig, hardware: Hardware) -> None:
    """The backend can honour every setting.

    Raises:
        ConfigError: listing each that it cannot.
    """
    problems = hardware.backend.check_config(config)
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise ConfigError(f"backend {hardware.backend.name!r} cannot honour the config:{listed}")


def moved_to_host(config: RunConfig) -> list[str]:
    """The settings that have something moved to the host's memory."""
    wanted = {
        "train.offload_activations": config.train.offload_activations,
        "parallel.offload": config.parallel.offload,
    }
    return [key for key, is_wanted in wanted.items() if is_wanted]


def check_offload(config: RunConfig, hardware: Hardware) -> None:
    """There is another memory than the host's to move something out of.

    Raises:
        ConfigError: the backend computes on the host.
    """
    keys = moved_to_host(config)
    if keys and hardware.device.type == HOST:
        raise ConfigError(
            f"{' and '.join(keys)}: backend {hardware.backend.name!r} computes in the host's memory, so that nothing "
            "could be moved there; leave it out, or take an accelerator."
        )


def check_trainable(config: RunConfig, spec: ModelSpec) -> frozenset[str]:
    """The parts that learn, all of which the model has.

    Raises:
        ConfigError: a part that the model lacks, or a learning rate for one that does not learn.
    """
    trainable = frozenset(config.train.trainable)
    absent = sorted(trainable & {"vision", "projector"}) if spec.vision is None else []
    if spec.projector == "identity" and "projector" in trainable:
        absent.append("projector")
    if absent:
        raise ConfigError(f"train.trainable names {absent}, which this model does not have.")
    rates = config.optimizer.part_learning_rates.model_dump(exclude_none=True)
    idle = sorted(set(rates) - trainable)
    if idle:
        raise ConfigError(
            f"optimizer.part_learning_rates is set for {idle}, frozen by train.trainable = {sorted(trainable)}: "
            "train them, or leave the rate out."
        )
    return trainable


def check_recompute(config: RunConfig, spec: ModelSpec) -> None:
    """The model has as many layers as are to be recomputed.

    Raises:
        ConfigError: it has fewer.
    """
    wanted, found = config.train.recompute_layers, spec.text.num_layers
    if wanted is not None and wanted > found:
        raise ConfigError(
            f"train.recompute_layers = {wanted}: the language model has {found} layers; lower it, or leave it out to "
            "recompute in each."
        )


def check_data_settings(config: RunConfig, spec: ModelSpec) -> None:
    """The data's settings mean something to this model.

    Raises:
        ConfigError: image settings for a model that sees nothing, or samples longer than its positions.
    """
    data = config.data
    of_images = {"images", "image_aspect", "min_tiles", "max_tiles", "max_image_pixels"}
    idle = sorted(of_images & data.model_fields_set) if spec.vision is None else []
    idle = [f"data.{key}" for key in idle if getattr(data, key) != type(data).model_fields[key].default]
    if spec.vision is None:
        idle += [f"data.sources.{number}.images" for number, source in enumerate(data.sources) if source.images]
        if (tried := config.validation) is not None:
            idle += ["validation.images"] if tried.images else []
            idle += [f"validation.sources.{number}.images" for number, one in enumerate(tried.sources) if one.images]
    if idle:
        raise ConfigError(f"{idle[0]} is set, and this model has no vision tower: leave it out.")
    if spec.vision is not None and (data.image_aspect == "anyres") != bool(spec.image_grid_pinpoints):
        has = "has no image_grid_pinpoints" if data.image_aspect == "anyres" else "is a LLaVA-NeXT"
        raise ConfigError(
            f"data.image_aspect = {data.image_aspect}: this model {has}; anyres goes with a LLaVA-NeXT, and no other "
            "does: set the one, or change the model (model.image_grid_pinpoints of a composed one)."
        )
    if data.max_length > spec.text.max_positions:
        raise ConfigError(
            f"data.max_length = {data.max_length}: the model has {spec.text.max_positions} positions; lower it."
        )


def check_vocabulary(tokenizer: Any, spec: ModelSpec) -> None:
    """Every id that text can become has a row in the embedding.

    Raises:
        ConfigError: naming tokens that have none.
    """
    rows = spec.text.vocab_size
    # The image's mark never becomes an id here, and padding is filled with an id that has a row.
    beyond = {
        token: index
        for token, index in tokenizer.get_vocab().items()
        if index >= rows and token not in (IMAGE_MARK, tokenizer.pad_token)
    }
    if beyond:
        shown = ", ".join(
            f"{token} = {index}" for token, index in sorted(beyond.items(), key=lambda t: t[1])[:MAX_LISTED]
        )
        raise ConfigError(
            f"the tokenizer has {len(beyond)} tokens beyond the {rows} rows of the model's embedding, e.g. {shown}: "
            "use the tokenizer that belongs to the model."
        )
