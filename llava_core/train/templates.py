"""Which conversation template each data set of a run has, and which one its export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llava_core.config.data import DataConfig
from llava_core.data.documents import TEXT
from llava_core.data.readers import Reader
from llava_core.data.readers.tokens import TokensReader
from llava_core.data.templates import Template, open_template
from llava_core.errors import ConfigError
from llava_core.inference.chat_template import OWN_TEMPLATE, folder_template
from llava_core.plugins import Registry
from llava_core.weights.export import exported_tokenizer
from llava_core.weights.source import ModelFolders

USUAL_TEMPLATE = "v1"
"""Of conversations, where none is named."""


@dataclass(frozen=True)
class Templates:
    """How conversations become text.

    Attributes:
        export: what an export's chat template writes.
        exported: the config's name of it.
        by_source: None where a source holds token ids.
    """

    export: Template
    exported: str
    by_source: tuple[Template | None, ...]


def find_templates(
    config: DataConfig, readers: Sequence[Reader], registry: Registry, tokenizer: Any, model: ModelFolders
) -> Templates:
    """The template of each data set, and the one that an export carries.

    Raises:
        ConfigError: a template for what is no conversation, or none where the export could have several; rows that were
            tokenised with another tokenizer or template; no chat template says what the export's does, so that it would
            answer otherwise than it learnt.
    """
    multimodal = model.spec.vision is not None
    names = _template_names(config, readers)
    found: dict[str, Template] = {}
    exported = _exported_name(config, names)
    for name in dict.fromkeys([*names, exported]):
        if name == OWN_TEMPLATE:
            found[name] = folder_template(model.tokenizer, tokenizer, multimodal=multimodal)
        elif name is not None:
            found[name] = open_template(name, registry)
    for reader, name in zip(readers, names, strict=True):
        if isinstance(reader, TokensReader):
            assert name is not None  # its rows were conversations or documents
            reader.check(tokenizer, found[name])
    export = found[exported]
    exported_tokenizer(tokenizer, export, multimodal=multimodal)
    return Templates(export, exported, tuple(None if name is None else found[name] for name in names))


def _template_names(config: DataConfig, readers: Sequence[Reader]) -> list[str | None]:
    """The template of each data set by name; None for token ids, which take none."""
    names: list[str | None] = []
    own = [given.template for given in config.sources] or [None]
    for number, (given, reader) in enumerate(zip(own, readers, strict=True)):
        where = f"data.sources.{number}.template"
        if reader.content == "conversations":
            usual = reader.template if isinstance(reader, TokensReader) else USUAL_TEMPLATE
            name = given or config.template or usual
            if name == TEXT.name:
                raise ConfigError(
                    f"{where if given else 'data.template'} = {name!r} is for documents, and this data "
                    "set holds conversations: name another."
                )
            names.append(name)
            continue
        if given is not None and (reader.content == "tokens" or given != TEXT.name):
            what = "token ids" if reader.content == "tokens" else "documents"
            raise ConfigError(f"{where} = {given!r}: this data set holds {what}, which take none; leave it out.")
        names.append(TEXT.name if reader.content == "texts" else None)
    return names


def _exported_name(config: DataConfig, names: Sequence[str | None]) -> str:
    """The template of an export: the data's own, or the one that all conversations have."""
    if config.template is not None:
        return config.template
    chats = sorted({name for name in names if name not in (None, TEXT.name)})
    if len(chats) > 1:
        raise ConfigError(
            f"the sources have the templates {', '.join(chats)}: set data.template to the one that the trained "
            "model is to be asked with."
        )
    return chats[0] if chats else TEXT.name
