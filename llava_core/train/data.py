"""A run's data: its readers, image processor and loader, from the config."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llava_core.config import RunConfig
from llava_core.config.data import DataConfig, SourceConfig
from llava_core.data.examples import ExampleBuilder
from llava_core.data.held_out import trained_on
from llava_core.data.image_side import ImageSide
from llava_core.data.image_store import ImageStore
from llava_core.data.images import ImageProcessor
from llava_core.data.loader import Batching, StepLoader
from llava_core.data.mixing import Mixture
from llava_core.data.quarantine import Quarantine
from llava_core.data.readers import Reader, open_reader, reader_name, unknown_suffix
from llava_core.data.readers.index import IntArray
from llava_core.data.records import modality_length
from llava_core.data.sampler import GROUPED_ORDERS, Grouping, epoch_order
from llava_core.data.share import WHOLE, Share
from llava_core.data.sources import Source, Sources
from llava_core.data.tiles import Anyres, Division, DynamicTiles, Tiling
from llava_core.engine.mesh import Mesh
from llava_core.engine.pipeline import num_micro_batches
from llava_core.engine.processes import Processes
from llava_core.errors import BadRow
from llava_core.model.spec import ModelSpec
from llava_core.plugins import Registry
from llava_core.train.agreement import by_first
from llava_core.train.templates import Templates
from llava_core.weights.processor import load_processor
from llava_core.weights.source import ModelFolders
from llava_core.weights.tokenizer import pad_token_id

INDEX_FOLDER = "index"
"""Where in the output folder the indices of large data sets are kept."""


def open_readers(config: RunConfig, registry: Registry, processes: Processes) -> tuple[Reader, ...]:
    """A reader for each data set, in their order.

    Raises:
        ConfigError: a data set that names no reader that there is.
        DataError: one that cannot be read.
    """
    if processes.size > 1:  # so that an index that takes long is made once
        by_first(processes, lambda: len(_open_readers(config, registry)))
    return _open_readers(config, registry)


def find_processor(config: DataConfig, model: ModelFolders) -> ImageProcessor | None:
    """The image processor of the model's folder, with the config's aspect; None for a language model.

    Raises:
        ConfigError: it does not give the image size that the tower takes.
    """
    if model.processor is None or model.spec.vision is None:
        return None
    if config.image_aspect == "tiles" or config.image_aspect == "anyres":
        return load_processor(model.processor, model.spec, dynamic_tiles(config))
    return load_processor(model.processor, model.spec, config.image_aspect)


def dynamic_tiles(config: DataConfig) -> DynamicTiles | None:
    """The config's limits of tiles, where it has some."""
    return None if config.max_tiles is None else DynamicTiles(config.min_tiles or 1, config.max_tiles)


def largest_image(spec: ModelSpec, tiling: Tiling | None, room: int) -> Division | None:
    """What an image becomes at most in a sample of fewer than `room` tokens; None where it fits none.

    Args:
        tiling: of a model that has none of its own.
    """
    if spec.vision is None:
        return None
    if spec.image_grid_pinpoints:
        tiling = Anyres(spec.image_grid_pinpoints)
    features = spec.vision.visual_tokens
    every = (Division(1, features, 0),) if tiling is None else tiling.divisions(spec.vision.image_size, features)
    fitting = [division for division in every if division.visual_tokens < room]
    return max(fitting, key=lambda division: division.visual_tokens, default=None)


def build_loader(
    config: RunConfig,
    readers: Sequence[Reader],
    templates: Templates,
    spec: ModelSpec,
    tokenizer: Any,
    processor: ImageProcessor | None,
    share: Share,
) -> StepLoader:
    """The data that the run trains on, this process's share of it."""
    data, seed = config.data, config.train.seed
    multimodal = processor is not None and spec.vision is not None
    fraction = config.validation.fraction if config.validation is not None else None
    sources = build_sources(data, readers, templates, multimodal=multimodal)
    if fraction is not None:
        sources = trained_on(sources, fraction)
    pad_id = pad_token_id(tokenizer, spec.text.vocab_size)
    builder = ExampleBuilder(
        sources=sources,
        tokenizer=tokenizer,
        images=ImageSide(processor, spec.vision.visual_tokens) if processor and spec.vision else None,
        pad_id=pad_id,
        vocab_size=spec.text.vocab_size,
        max_length=data.max_length,
        overlong=data.overlong,
    )
    batching = Batching(
        global_size=config.batch.global_size,
        micro_tokens=config.batch.micro_tokens,
        micro_size=config.batch.micro_size,
        pad_id=pad_id,
        image_size=spec.vision.image_size if spec.vision else 1,
        **pipelined(config),
    )
    weights = [given.weight for given in data.inputs if given.weight is not None]
    mixture = Mixture(sources.lengths, weights or None, data.order, seed)
    quarantine = Quarantine(config.output / "quarantine.jsonl", data.max_bad_fraction, writes=share.writes)
    order = _epoch_order(config, sources, mixture)
    return StepLoader(builder, order, mixture.num_rows, batching, quarantine, data.num_workers, share)


def build_sources(
    data: DataConfig, readers: Sequence[Reader], templates: Templates, *, multimodal: bool, name: str = "the data"
) -> Sources:
    """The data sets with all of their rows; `name` is for messages. Raises DataError for one without any."""
    return Sources(
        [
            Source(reader, template, ImageStore(given.images, data.max_image_pixels) if multimodal else None)
            for reader, template, given in zip(readers, templates.by_source, data.inputs, strict=True)
        ],
        name,
    )


def pipelined(config: RunConfig) -> dict[str, Any]:
    """What a pipeline asks of a step's micro-batches: one size, and a number that its schedule takes."""
    parallel = config.parallel
    if parallel.pipeline == 1:
        return {}
    interleaved = parallel.num_stages > parallel.pipeline
    fill = partial(num_micro_batches, num_processes=parallel.pipeline, interleaved=interleaved)
    return {"one_size": True, "num_batches": fill}


def largest_micro_batch(config: RunConfig) -> int:
    """Tokens that no micro-batch exceeds."""
    if config.batch.micro_tokens is not None:
        return config.batch.micro_tokens
    assert config.batch.micro_size is not None
    return config.batch.micro_size * config.data.max_length


def data_share(mesh: Mesh | None) -> Share:
    """Which of each step's samples this process takes."""
    if mesh is None:
        return WHOLE
    return Share(mesh.data_index, mesh.layout.data, mesh.processes.gather, mesh.processes.is_first)


def _open_readers(config: RunConfig, registry: Registry) -> tuple[Reader, ...]:
    return tuple(open_source(given, registry, config.output / INDEX_FOLDER) for given in config.data.inputs)


def open_source(given: SourceConfig, registry: Registry, index_folder: Path | None) -> Reader:
    """The reader of one data set; `index_folder` as readers take it. Raises as `open_readers`."""
    name = given.reader or reader_name(given.path)
    if name is None:
        raise unknown_suffix(given.path, registry.names("reader"))
    factories = {name: registry.load("reader", name)}
    return open_reader(given.path, name, factories, split=given.split, index_folder=index_folder)


def _epoch_order(config: RunConfig, sources: Sources, mixture: Mixture) -> Callable[[int], IntArray]:
    """The rows of an epoch in their order, by its number."""
    order, seed, micro_size = config.data.order, config.train.seed, config.batch.micro_size
    chunk = micro_size or 1  # packed micro-batches are formed later, so every row is its own chunk
    lengths = _modality_lengths(sources) if order in GROUPED_ORDERS else None

    def ordered(epoch: int) -> IntArray:
        rows = mixture.rows(epoch)
        grouping = None
        if lengths is not None:
            num_chunks = config.batch.global_size // chunk
            grouping = Grouping(lengths[rows].tolist(), chunk, num_chunks, config.data.mega_batch_mult)
        return rows[epoch_order(order, len(rows), seed, epoch, grouping)]

    return ordered


def _modality_lengths(sources: Sources) -> IntArray:
    """Every row's length for grouping; one without words or that cannot be read counts as a word of text."""
    lengths = np.full(len(sources), -1, dtype=np.int64)
    for index in range(len(sources)):
        place = sources.find(index)
        with suppress(BadRow):  # it is set aside when its turn comes
            lengths[index] = modality_length(sources.sources[place.source].reader.read(place.row)) or -1
    return lengths
