"""Language models from one spelling to another: the same numbers under other names."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeAlias

import torch

from llava_core.backend import OpSet
from llava_core.errors import WeightsError
from llava_core.model.spec import TextSpec
from llava_core.weights.export import refuse_foreign, write_folder
from llava_core.weights.load import load_model
from llava_core.weights.source import ModelSource, from_folder
from llava_core.weights.tokenizer import load_tokenizer
from llava_core.weights.vocabulary import frozen_tokenizer

Target: TypeAlias = Literal["llama", "internlm2"]


def convert(folder: Path, output: Path, target: Target) -> Path:
    """Writes the language model of `folder` to `output` as a Llama or as an InternLM2; returns `output`.

    Weights keep their bits and dtype. The tokenizer is written as one that needs no code, with its own chat template.

    Raises:
        WeightsError: a folder that cannot be read, holds something else or has no spelling of that kind.
    """
    refuse_foreign(output)
    source = from_folder(folder)
    spec = replace(source.spec, text=_spelt(source, target, folder))
    found = load_tokenizer(folder)
    tokenizer = frozen_tokenizer(found, found.chat_template, multimodal=False, adds_bos=True)
    dtype = _dtype(source, folder)
    model = load_model(source, OpSet.of({}), compute_dtype=dtype, device=torch.device("cpu"))
    weights = (parameter.detach() for parameter in model.parameters())
    remote = source.remote if target == "internlm2" else None
    write_folder(
        output, model, spec, weights, tokenizer, _ends(folder, tokenizer.eos_token_id), dtype=dtype, remote=remote
    )
    return output


def _spelt(source: ModelSource, target: Target, folder: Path) -> TextSpec:
    """The model in the target's spelling."""
    spec = source.spec.text
    if source.spec.vision is not None:
        raise WeightsError(f"{folder} is a LLaVA, whose language model is spelt as a Llama; expected a language model.")
    if spec.family not in ("llama", "internlm2"):
        raise WeightsError(f"{folder} is a {spec.family}; expected llama or internlm2.")
    if target == "internlm2" and spec.rope.kind not in ("default", "linear", "dynamic"):
        raise WeightsError(f"{folder}: InternLM2's code has no rope type {spec.rope.kind!r}.")
    if target == "internlm2" and spec.head_dim * spec.num_heads != spec.hidden_size:
        raise WeightsError(
            f"{folder}: {spec.num_heads} heads of {spec.head_dim} are not hidden_size {spec.hidden_size}, which "
            "InternLM2's code takes for granted."
        )
    return replace(spec, family=target)


def _dtype(source: ModelSource, folder: Path) -> torch.dtype:
    found = {load()[(slice(0, 0),)].dtype for load in source.tensors.values()}
    if len(found) != 1:
        raise WeightsError(f"{folder} holds tensors of several types: {sorted(map(str, found))}; expected one.")
    return found.pop()


def _ends(folder: Path, eos: int) -> list[int]:
    """The tokens that end an answer, as the folder says."""
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        found = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
        if found is not None:
            return list(found) if isinstance(found, list) else [found]
    return [eos]
