"""A run's data: its template, image processor and loader, from the config."""

from __future__ import annotations

from functools import partial
from typing import Any

from llava_core.config import RunConfig
from llava_core.config.schema import DataConfig
from llava_core.data.examples import ExampleBuilder, ImageSide
from llava_core.data.image_store import ImageStore
from llava_core.data.images import ImageProcessor
from llava_core.data.loader import Batching, StepLoader
from llava_core.data.quarantine import Quarantine
from llava_core.data.readers import SUFFIX_READERS, Reader, open_reader
from llava_core.data.records import modality_length
from llava_core.data.sampler import Grouping, epoch_order
from llava_core.data.share import WHOLE, Share
from llava_core.data.templates import Template, open_template
from llava_core.engine.mesh import Mesh
from llava_core.engine.pipeline import num_micro_batches
from llava_core.errors import BadRow, ConfigError
from llava_core.inference.chat_template import OWN_TEMPLATE, folder_template
from llava_core.model.spec import ModelSpec
from llava_core.plugins import Registry
from llava_core.weights.export import exported_tokenizer
from llava_core.weights.source import ModelSource
from llava_core.weights.tokenizer import pad_token_id


def find_template(name: str, registry: Registry, tokenizer: Any, source: ModelSource) -> Template:
    """The conversation template of that name or file, or the tokenizer's own; one that an export can carry.

    Raises:
        ConfigError: no chat template says what this one does, so that an export would answer otherwise than it learnt.
    """
    multimodal = source.spec.vision is not None
    if name == OWN_TEMPLATE:
        template = folder_template(source.tokenizer_folder, tokenizer, multimodal=multimodal)
    else:
        template = open_template(name, registry)
    exported_tokenizer(tokenizer, template, multimodal=multimodal)
    return template


def find_processor(config: DataConfig, source: ModelSource) -> ImageProcessor | None:
    """The image processor of the model's folder, with the config's aspect; None for a language model.

    Raises:
        ConfigError: it does not give the image size that the tower takes.
    """
    if source.processor_folder is None or source.spec.vision is None:
        return None
    processor = ImageProcessor.from_folder(source.processor_folder, config.image_aspect)
    expected = source.spec.vision.image_size
    if processor.output_size != (expected, expected):
        raise ConfigError(
            f"{source.processor_folder}: its image processor gives {processor.output_size} pixels and the vision tower "
            f"takes {expected} x {expected}; mend preprocessor_config.json."
        )
    return processor


def build_loader(
    config: RunConfig,
    registry: Registry,
    spec: ModelSpec,
    tokenizer: Any,
    template: Template,
    processor: ImageProcessor | None,
    share: Share,
) -> StepLoader:
    """The data of the run, this process's share of it."""
    data = config.data
    reader = _open_reader(data, registry)
    images = None
    if processor is not None and spec.vision is not None and data.images is not None:
        store = ImageStore(data.images, data.max_image_pixels)
        images = ImageSide(store, processor, spec.vision.visual_tokens)
    pad_id = pad_token_id(tokenizer, spec.text.vocab_size)
    builder = ExampleBuilder(reader, template, tokenizer, images, pad_id, data.max_length)
    batching = Batching(
        global_size=config.batch.global_size,
        micro_tokens=config.batch.micro_tokens,
        micro_size=config.batch.micro_size,
        pad_id=pad_id,
        image_size=spec.vision.image_size if spec.vision else 1,
        **pipelined(config),
    )
    micro_size = config.batch.micro_size or 1  # packed micro-batches are formed later, so every row is its own chunk
    grouping = None
    if data.order == "modality_length":
        grouping = Grouping(_modality_lengths(reader), micro_size, config.batch.global_size // micro_size)
    quarantine = Quarantine(config.output / "quarantine.jsonl", data.max_bad_fraction, writes=share.writes)
    return StepLoader(
        builder,
        lambda epoch: epoch_order(data.order, len(reader), config.train.seed, epoch, grouping),
        batching,
        quarantine,
        data.num_workers,
        share,
    )


def pipelined(config: RunConfig) -> dict[str, Any]:
    """What a pipeline asks of micro-batches: one size, and a number that its schedule takes."""
    parallel = config.parallel
    if parallel.pipeline == 1:
        return {}
    interleaved = parallel.num_stages > parallel.pipeline
    fill = partial(num_micro_batches, num_processes=parallel.pipeline, interleaved=interleaved)
    return {"num_tokens": largest_micro_batch(config), "num_batches": fill}


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


def _open_reader(config: DataConfig, registry: Registry) -> Reader:
    name = config.reader or SUFFIX_READERS.get(config.path.suffix.lower())
    names = [name] if name is not None else registry.names("reader")  # without a name its message lists them
    return open_reader(config.path, name, {name: registry.load("reader", name) for name in names})


def _modality_lengths(reader: Reader) -> list[int]:
    """Every row's length for grouping; one without words or that cannot be read counts as a word of text."""
    lengths = []
    for index in range(len(reader)):
        try:
            lengths.append(modality_length(reader.read(index)) or -1)
        except BadRow:
            lengths.append(-1)
    return lengths
