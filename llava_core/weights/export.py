"""Exports: complete Hugging Face folders, which transformers loads and which answer as the model does here."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor
from torch.distributed.tensor import DTensor

from llava_core.data.images import ImageProcessor
from llava_core.data.records import IMAGE_MARK
from llava_core.data.templates import Template
from llava_core.errors import WeightsError
from llava_core.model.llava import Llava
from llava_core.model.spec import ModelSpec, VisionSpec
from llava_core.weights.chat_templates import chat_template
from llava_core.weights.hf_config import llava_config
from llava_core.weights.names import to_language_only
from llava_core.weights.shards import TensorToWrite, write_weights
from llava_core.weights.vocabulary import frozen_tokenizer, grown, grown_size, stop_ids, written_bos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

MAX_FILE_BYTES = 5_000_000_000
EXPORTED_BY = {"exported_by": "llava-core"}
"""In `config.json`: the folder is an export, which a later export may replace."""

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
    writes: bool = True,
) -> Path:
    """Writes the model to `folder`, which appears when it is complete and durable; returns it.

    transformers loads the folder with LlavaForConditionalGeneration and AutoProcessor, or, without a vision tower, with
    AutoModelForCausalLM and AutoTokenizer. Two things differ from the model in memory:

    - A tokenizer without `<image>` gets it, as transformers needs; see `vocabulary.grown` for the rows this may add.
    - transformers knows the projector `mlp2x_gelu` only. With another one it refuses the folder; this library reads it.

    The weights are read once each, in the order of `named_parameters`, and copied to the host one at a time. An earlier
    export at `folder` is replaced when the new one is complete; between the two renames this takes, a crash leaves both
    beside it, as `.partial` and `.replaced`.

    Of a model that is spread over processes each of them calls this, and one weight at a time is whole in each.

    Args:
        template: the one that the model was trained with; becomes the chat template.
        dtype: of the weights: fp32, bf16 or fp16.
        writes: False in all processes but one, which only hand over what they hold. Where the one fails, it still takes
            what they hand over, so that they do not wait for it; the error is raised there alone.

    Raises:
        WeightsError: `folder` holds something else; it is left alone.
        ConfigError: a tokenizer or template that cannot be exported exactly. Nothing was written.
    """
    weights = _whole_weights(model)
    try:
        if writes:
            _write(model, weights, tokenizer, image_processor, template, Path(folder), dtype)
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
) -> None:
    refuse_foreign(folder)
    multimodal = model.spec.vision is not None
    if multimodal != (image_processor is not None):
        raise WeightsError("a model with a vision tower is exported with its image processor, and only such a model.")
    exported = exported_tokenizer(tokenizer, template, multimodal=multimodal)
    spec = _exported_spec(model.spec, exported)
    partial = _beside(folder, ".partial")
    _remove(partial)
    partial.mkdir(parents=True)
    try:
        write_weights(partial, _tensors(model, spec, weights), dtype, max_file_bytes=MAX_FILE_BYTES)
        exported.save_pretrained(partial)
        for name, content in _configs(spec, exported, image_processor, template, dtype).items():
            (partial / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        _put_in_place(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # frees a full disk; the next export sweeps what resists
        raise


def _exported_spec(spec: ModelSpec, tokenizer: PreTrainedTokenizerFast) -> ModelSpec:
    text = replace(spec.text, vocab_size=grown_size(spec.text.vocab_size, tokenizer))
    if spec.vision is None:
        return replace(spec, text=text)
    return replace(spec, text=text, image_token_id=tokenizer.get_vocab()[IMAGE_MARK])


def _whole_weights(model: Llava) -> Iterator[Tensor]:
    """Each parameter, put together from all processes where it is spread; a step of one is a step of all."""
    for _, parameter in model.named_parameters():
        weight = parameter.detach()
        yield weight.full_tensor() if isinstance(weight, DTensor) else weight


def _tensors(model: Llava, spec: ModelSpec, weights: Iterator[Tensor]) -> dict[str, TensorToWrite]:
    """What is written, in the order of `weights`, from which it is taken when its turn comes."""
    tensors = {}
    for name, parameter in model.named_parameters():
        shape, disk_name = tuple(parameter.shape), name if spec.vision else to_language_only(name)
        num_rows = spec.text.vocab_size if name in (EMBEDDING, HEAD) else shape[0]
        read = functools.partial(_take, weights, num_rows)
        tensors[disk_name] = TensorToWrite((num_rows, *shape[1:]), read)
    return tensors


def _take(weights: Iterator[Tensor], num_rows: int) -> Tensor:
    return grown(next(weights), num_rows)


def _configs(
    spec: ModelSpec,
    tokenizer: PreTrainedTokenizerFast,
    image_processor: ImageProcessor | None,
    template: Template,
    dtype: torch.dtype,
) -> dict[str, dict[str, Any]]:
    """The JSON files of the folder, but for the tokenizer's."""
    ends = stop_ids(tokenizer, template.stop)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else list(ends),
        "pad_token_id": tokenizer.pad_token_id,
    }
    version = {"transformers_version": transformers.__version__}
    # `torch_dtype` is read by every release; `dtype` by new ones alone.
    config = llava_config(spec) | ids | EXPORTED_BY | {"torch_dtype": str(dtype).removeprefix("torch.")} | version
    if spec.vision is None or image_processor is None:
        return {"config.json": config, "generation_config.json": ids | version}
    config["text_config"] |= ids
    return {
        "config.json": config,
        "generation_config.json": ids | version,
        "preprocessor_config.json": image_processor.to_config(),
        "processor_config.json": _processor_config(spec.vision),
    }


def _processor_config(vision: VisionSpec) -> dict[str, Any]:
    return {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_MARK,
        "patch_size": vision.patch_size,
        # transformers counts an image's tokens as patches + this, less one where the class token is dropped.
        "num_additional_image_tokens": vision.num_positions - vision.num_patches,
        "vision_feature_select_strategy": vision.feature_select,
    }


def _put_in_place(partial: Path, folder: Path) -> None:
    """Gives a complete folder its name, durably."""
    for file in partial.iterdir():
        _sync(file)
    _sync(partial)
    replaced = _beside(folder, ".replaced")
    _remove(replaced)
    if folder.exists():
        os.rename(folder, replaced)
    os.rename(partial, folder)
    _sync(folder.parent)
    _remove(replaced)


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(folder.name + suffix)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _sync(path: Path) -> None:
    """Make a file's bytes, or the names in a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
