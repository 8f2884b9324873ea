"""InternLM2 folders: a Llama under other names, whose query, key and value matrices are one.

Their own classes are code that lies in the folder and is never run here: `config.json` is read as it stands, and an
export writes it so. Source: configuration_internlm2.py and modeling_internlm2.py of InternLM/internlm2-chat-20b.

Shapes: D width, N query heads, G key/value heads, H head dim.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PretrainedConfig

from llava_core.errors import WeightsError
from llava_core.model.spec import TextSpec
from llava_core.weights.names import FUSED, SEPARATE
from llava_core.weights.rows import Rows, Sliceable

MODEL_TYPE = "internlm2"

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "bias",
)
"""Keys whose default is in the folder's code, and is another in each release of it."""

OWN_KEYS = ("model_type", "architectures", "auto_map", "bias", "attn_implementation", "torch_dtype", "dtype")
"""Keys that mean nothing to a Llama's config, or something else."""


class InternLm2Config(LlamaConfig):
    """The config as a Llama's, which its numbers are."""

    model_type = MODEL_TYPE


@dataclass(frozen=True)
class RemoteCode:
    """What an export takes over from the folder that the model came from.

    Attributes:
        config: its `config.json`.
        files: the code that `config.json` names, as far as the folder has it.
    """

    config: Mapping[str, Any]
    files: tuple[Path, ...]

    @classmethod
    def of(cls, folder: Path) -> RemoteCode:
        """Finds the code of a folder whose config was read before; it is copied, never imported."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        named = config.get("auto_map") or {}
        modules = sorted({str(address).rpartition(".")[0] for address in named.values()})
        files = (folder / f"{module}.py" for module in modules)
        return cls(config, tuple(file for file in files if file.is_file()))


def read_config(found: Mapping[str, Any], file: Path) -> PretrainedConfig:
    """The config of an InternLM2 folder from the JSON in `file`.

    Raises:
        WeightsError: a key that is not there and whose default only the folder's code knows; biases.
    """
    missing = [key for key in REQUIRED if found.get(key) is None]
    if missing:
        raise WeightsError(f"{file} does not say {', '.join(missing)}: the defaults are in code, which is not run.")
    if found["bias"] is not False:
        raise WeightsError(f"{file}: bias = {found['bias']!r}: attention biases are not implemented; expected false.")
    values = {key: value for key, value in found.items() if key not in OWN_KEYS}
    return InternLm2Config(**({"tie_word_embeddings": False, "num_key_value_heads": None} | values))


def own_config(written: Mapping[str, Any], remote: RemoteCode | None) -> dict[str, Any]:
    """The `config.json` of an InternLM2 export: `written` as for a Llama, in InternLM2's keys, over what was found."""
    found = dict(remote.config) if remote is not None else {"attn_implementation": "eager"}
    own = {key: value for key, value in written.items() if key not in ("architectures", "head_dim")}
    scaling = own.get("rope_scaling")
    if scaling is not None:
        own["rope_scaling"] = {"type": scaling["rope_type"], "factor": scaling["factor"]}
    return found | own | {"architectures": ["InternLM2ForCausalLM"], "model_type": MODEL_TYPE, "bias": False}


def split_fused(tensors: Mapping[str, Callable[[], Sliceable]], spec: TextSpec) -> dict[str, Callable[[], Sliceable]]:
    """Loaders in which each fused matrix is three, so that a process reads no more of it than it holds.

    The rows of key/value head g are those of its N/G query heads, then its key's, then its value's, H each; so the
    rows of each of the three are runs of the file's.

    Raises:
        WeightsError: a matrix of another height, when it is read.
    """
    split: dict[str, Callable[[], Sliceable]] = {}
    for name, load in tensors.items():
        if not name.endswith(FUSED):
            split[name] = load
            continue
        for part, runs in zip(SEPARATE, _runs(spec), strict=True):
            split[name.removesuffix(FUSED) + part] = partial(_rows, name, load, runs, spec)
    return split


def fused(parts: Sequence[Tensor], spec: TextSpec) -> Tensor:
    """The fused matrix [(N + 2·G)·H, D] of q [N·H, D], k [G·H, D] and v [G·H, D]."""
    grouped = [part.unflatten(0, (spec.num_kv_heads, -1)) for part in parts]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def _runs(spec: TextSpec) -> tuple[list[range], list[range], list[range]]:
    """Which rows of the fused matrix the queries, keys and values are."""
    head, queries = spec.head_dim, spec.num_heads // spec.num_kv_heads * spec.head_dim
    starts = range(0, spec.num_kv_heads * (queries + 2 * head), queries + 2 * head)
    return (
        [range(start, start + queries) for start in starts],
        [range(start + queries, start + queries + head) for start in starts],
        [range(start + queries + head, start + queries + 2 * head) for start in starts],
    )


def _rows(name: str, load: Callable[[], Sliceable], runs: Sequence[range], spec: TextSpec) -> Rows:
    tensor = load()
    expected = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    if len(tensor.shape) != 2 or tensor.shape[0] != expected:
        raise WeightsError(
            f"{name} has the shape {tuple(tensor.shape)}; expected {expected} rows: {spec.num_heads} query heads and "
            f"twice {spec.num_kv_heads} key/value heads of {spec.head_dim} each."
        )
    return Rows(tensor, runs)
