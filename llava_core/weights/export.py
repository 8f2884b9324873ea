"""Exports: complete Hugging Face folders, which transformers loads and which answer as the model does here."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llava_core.data.images import ImageProcessor
from llava_core.data.records import IMAGE_MARK
from llava_core.data.templates import Template
from llava_core.errors import WeightsError
from llava_core.model.llava import Llava
from llava_core.model.spec import ModelSpec, TextSpec
from llava_core.weights.chat_templates import chat_template
from llava_core.weights.config_files import EXPORTED_BY, write_files
from llava_core.weights.internlm2 import RemoteCode, fused
from llava_core.weights.load import outline
from llava_core.weights.merged import merged
from llava_core.weights.names import to_internlm2, to_language_only, to_llava
from llava_core.weights.new_folder import new_folder
from llava_core.weights.shards import TensorToWrite, whole_tensor, write_weights
from llava_core.weights.vocabulary import frozen_tokenizer, grown, grown_size, stop_ids, written_bos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

MAX_FILE_BYTES = 5_000_000_000
EMBEDDING = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"


def export_model(
    model: Llava,
    tokenizer: PreTrainedTokenizerBase,
    image_processor: ImageProcessor | None,
    template: Template,
    folder: Path,
    *,
    dtype: torch.dtype,
    remote: RemoteCode | None = None,
    writes: bool = True,
    weights: Iterator[Tensor] | None = None,
) -> Path:
    """Writes the model to `folder`, which appears when it is complete and durable; returns it.

    transformers loads the folder with Llava- or LlavaNextForConditionalGeneration and AutoProcessor, or, without a
    vision tower, with AutoModelForCausalLM and AutoTokenizer. An InternLM2 is written as it was found, and needs its
    own code there; in a LLaVA it is written as the Llama that it is. Two things differ from the model in memory:

    - A tokenizer without `<image>` gets it, as transformers needs; see `vocabulary.grown` for the rows this may add.
    - transformers knows the projector `mlp2x_gelu` only. With another one it refuses the folder; this library reads it.

    The weights are read once each, in the order of `outline`, and copied to the host one at a time. An earlier
    export at `folder` is replaced when the new one is complete; between the two renames this takes, a crash leaves both
    beside it, as `.partial` and `.replaced`.

    Adapters are merged into the weights that they are beside.

    Of a model that is spread over processes each of them calls this, and one weight at a time is whole in each.

    Args:
        template: the one that the model was trained with; becomes the chat template.
        dtype: of the weights: fp32, bf16 or fp16.
        remote: of the folder that a language model came from; see `ModelSource`.
        writes: False in all processes but one, which only hand over what they hold. Where the one fails, it still takes
            what they hand over, so that they do not wait for it; the error is raised there alone.
        weights: each weight, whole, where `model` is only a stage; in the order of `outline`, too.

    Raises:
        WeightsError: `folder` holds something else; it is left alone.
        ConfigError: a tokenizer or template that cannot be exported exactly. Nothing was written.
    """
    weights = weights or whole_weights(model)
    plain = weights if model.adapters is None else merged(outline(model.spec, adapters=model.adapters), weights)
    try:
        if writes:
            _write(model, plain, tokenizer, image_processor, template, Path(folder), dtype, remote)
    finally:
        for _ in weights:
            pass
    return Path(folder)


def exported_tokenizer(
    tokenizer: PreTrainedTokenizerBase, template: Template, *, multimodal: bool
) -> PreTrainedTokenizerFast:
    """The tokenizer of an export, with the chat template that writes `template`'s text.

    Raises:
        ConfigError: a tokenizer or template that cannot be exported exactly.
    """
    return frozen_tokenizer(
        tokenizer,
        chat_template(template, multimodal=multimodal, bos=written_bos(tokenizer)),
        multimodal=multimodal,
        # Without a vision tower the text goes through the tokenizer's own chat method, which adds no BOS in any case.
        adds_bos=template.adds_bos or not multimodal,
    )


def refuse_foreign(folder: Path) -> None:
    """Checks that an export may be written to `folder`: it is absent, empty, or an earlier export.

    Raises:
        WeightsError: it is not.
    """
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return
    config = folder / "config.json"
    try:
        ours = json.loads(config.read_text(encoding="utf-8")).items() >= EXPORTED_BY.items()
    except (OSError, ValueError, AttributeError):
        ours = False
    if not ours:
        raise WeightsError(
            f"{folder} exists and is no export of llava-core, so it is not replaced. Remove it or name another folder."
        )


def _write(
    model: Llava,
    weights: Iterator[Tensor],
    tokenizer: PreTrainedTokenizerBase,
    image_processor: ImageProcessor | None,
    template: Template,
    folder: Path,
    dtype: torch.dtype,
    remote: RemoteCode | None,
) -> None:
    refuse_foreign(folder)
    multimodal = model.spec.vision is not None
    if multimodal != (image_processor is not None):
        raise WeightsError("a model with a vision tower is exported with its image processor, and only such a model.")
    exported = exported_tokenizer(tokenizer, template, multimodal=multimodal)
    spec = _exported_spec(model.spec, exported)
    ends = stop_ids(exported, template.stop)
    write_folder(
        folder, model, spec, weights, exported, ends, dtype=dtype, image_processor=image_processor, remote=remote
    )


def write_folder(
    folder: Path,
    model: Llava,
    spec: ModelSpec,
    weights: Iterator[Tensor],
    tokenizer: PreTrainedTokenizerBase,
    ends: Sequence[int],
    *,
    dtype: torch.dtype,
    image_processor: ImageProcessor | None = None,
    remote: RemoteCode | None = None,
) -> None:
    """Writes `weights`, the model's parameters in their order, and all that goes with them, as `spec` says."""
    with new_folder(folder) as partial:
        write_weights(partial, _tensors(outline(model.spec), spec, weights), dtype, max_file_bytes=MAX_FILE_BYTES)
        write_files(partial, spec, tokenizer, ends, dtype, image_processor=image_processor, remote=remote)


def _exported_spec(spec: ModelSpec, tokenizer: PreTrainedTokenizerFast) -> ModelSpec:
    text = replace(spec.text, vocab_size=grown_size(spec.text.vocab_size, tokenizer))
    if spec.vision is None:
        return replace(spec, text=text)
    return replace(spec, text=text, image_token_id=tokenizer.get_vocab()[IMAGE_MARK])


def whole_weights(model: Llava, names: Container[str] | None = None) -> Iterator[Tensor]:
    """Each parameter, or each of `names`, put together from all processes where it is spread; a step of one is a step
    of all."""
    for name, parameter in model.named_parameters():
        if names is None or name in names:
            yield whole_tensor(parameter.detach())


def _tensors(whole: Llava, spec: ModelSpec, weights: Iterator[Tensor]) -> dict[str, TensorToWrite]:
    """What is written, in the order of `weights`, from which it is taken when its turn comes."""
    tensors = {}
    for disk_name, group in groupby(whole.named_parameters(), key=lambda named: _disk_name(named[0], spec)):
        shapes = {name: tuple(parameter.shape) for name, parameter in group}
        (_, *others), is_vocabulary = next(iter(shapes.values())), not shapes.keys().isdisjoint((EMBEDDING, HEAD))
        num_rows = spec.text.vocab_size if is_vocabulary else sum(rows for rows, *_ in shapes.values())
        read = functools.partial(_take, weights, len(shapes), num_rows, spec.text)
        tensors[disk_name] = TensorToWrite((num_rows, *others), read)
    return tensors


def _disk_name(name: str, spec: ModelSpec) -> str:
    """What a parameter is called in the folder; neighbours that share a name are one tensor there."""
    if spec.vision is not None:
        return to_llava(name)
    name = to_language_only(name)
    return to_internlm2(name) if spec.text.family == "internlm2" else name


def _take(weights: Iterator[Tensor], num_parts: int, num_rows: int, spec: TextSpec) -> Tensor:
    parts = list(islice(weights, num_parts))
    return grown(parts[0], num_rows) if num_parts == 1 else fused(parts, spec)
