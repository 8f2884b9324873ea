"""All of a run's data: what it trains on and what it validates on, ready for the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llava_core.config import RunConfig
from llava_core.data.images import ImageProcessor
from llava_core.data.loader import StepLoader
from llava_core.data.share import Share
from llava_core.engine.processes import Processes
from llava_core.plugins import Registry
from llava_core.train.checks import check_vocabulary
from llava_core.train.data import build_loader, find_processor, open_readers
from llava_core.train.templates import Templates, find_templates
from llava_core.train.validation import Validation, build_validation
from llava_core.weights.source import ModelFolders
from llava_core.weights.tokenizer import load_tokenizer


@dataclass(frozen=True)
class RunData:
    """What a run reads, and what makes samples of it.

    Attributes:
        processor: None for a language model.
        loader: of what is trained on.
        validation: None where nothing is validated on.
    """

    tokenizer: Any
    templates: Templates
    processor: ImageProcessor | None
    loader: StepLoader
    validation: Validation | None


def build_data(
    config: RunConfig, registry: Registry, processes: Processes, model: ModelFolders, share: Share
) -> RunData:
    """The data of the config for this model, this process's share of it.

    Raises:
        LlavaError: what cannot be honoured; nothing has been written but indices of large data sets.
    """
    tokenizer = load_tokenizer(model.tokenizer)
    check_vocabulary(tokenizer, model.spec)
    readers = open_readers(config, registry, processes)
    templates = find_templates(config.data, readers, registry, tokenizer, model)
    processor = find_processor(config.data, model)
    loader = build_loader(config, readers, templates, model.spec, tokenizer, processor, share)
    validation = build_validation(config, registry, processes, model, templates, loader)
    return RunData(tokenizer, templates, processor, loader, validation)
