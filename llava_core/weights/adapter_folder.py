"""Adapters on disk: peft's folders, under transformers' names, which PeftModel puts on the transformers model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_core.errors import WeightsError
from llava_core.model.adapters import NAME, Adapters, peft_config
from llava_core.model.freeze import PARTS, is_adapter, part_of
from llava_core.model.spec import ModelSpec
from llava_core.weights import names
from llava_core.weights.folder import WeightsFolder
from llava_core.weights.load import outline
from llava_core.weights.new_folder import new_folder
from llava_core.weights.rows import Sliceable
from llava_core.weights.shards import TensorToWrite, write_tensors
from llava_core.weights.source import ModelSource

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What peft puts before a name of the model."""

WHOLE_MODULES = {
    "vision": ("vision_tower",),
    "projector": ("multi_modal_projector",),
    "language": ("language_model", "lm_head"),
}
"""transformers' modules of a part that learns whole; the adapter's folder holds them, too."""

MAX_LISTED = 5


def put_adapters(
    source: ModelSource, adapters: Adapters, folder: Path | None, trainable: Collection[str]
) -> ModelSource:
    """The model with adapters: those of `folder`, or fresh ones.

    Raises:
        WeightsError: as `read_adapter`; or `folder` holds weights that do not learn further, which would be missing in
            the adapter that this run leaves.
    """
    if folder is None:
        return replace(source, adapters=adapters)
    read = read_adapter(folder, source.spec, adapters)
    parameters = {name for name, _ in outline(source.spec, adapters=adapters).named_parameters()}
    lost = sorted(parameters & read.keys() - set(learnt_names(source.spec, trainable, adapters)))
    if lost:
        parts = [part for part in PARTS if part in map(part_of, lost) and part not in adapters.parts]
        remedy = f"Add {', '.join(parts)} to train.trainable, or take" if parts else "Take"
        raise WeightsError(
            f"{folder} holds weights that learnt beside its adapters and would be frozen in this run "
            f"(train.trainable = {list(trainable)}), whose own adapter would lack them: {_some(lost)}. {remedy} "
            "a model that they are merged into, like the hf of the run that left them, as model.path without lora.path."
        )
    return replace(
        source, adapters=adapters, tensors={**source.tensors, **read}, files=(*source.files, folder / WEIGHTS)
    )


def learnt_names(spec: ModelSpec, trainable: Collection[str], adapters: Adapters) -> list[str]:
    """The parameters that an adapter's folder holds, in the order of the outline: all that learn."""
    whole = outline(spec, trainable, adapters=adapters)
    return [name for name, parameter in whole.named_parameters() if parameter.requires_grad]


def write_adapter(
    folder: Path,
    spec: ModelSpec,
    trainable: Collection[str],
    adapters: Adapters,
    weights: Iterator[Tensor],
    base: Path | None,
) -> None:
    """Writes `folder`, which appears when it is complete; in fp32, as what learns is kept.

    Args:
        weights: of `learnt_names`, each whole.
        base: the folder of the model that the adapter is for; None where there is none.

    Raises:
        WeightsError: `folder` holds something else; it is left alone.
    """
    refuse_other_than_adapter(folder)
    config = peft_config(adapters, spec)
    modules = [module for part in trainable if part not in adapters.parts for module in WHOLE_MODULES[part]]
    config.modules_to_save = [m for m in modules if m != "lm_head" or not spec.text.tied_embeddings] or None
    config.base_model_name_or_path = None if base is None else str(base)
    config.inference_mode = True
    if spec.vision is None:
        config.task_type = "CAUSAL_LM"
    shapes = {name: tuple(p.shape) for name, p in outline(spec, trainable, adapters=adapters).named_parameters()}
    to_disk = Spelling(spec)
    tensors = {
        to_disk(name): TensorToWrite(shapes[name], partial(next, weights))
        for name in learnt_names(spec, trainable, adapters)
    }
    with new_folder(folder) as partial_folder:
        config.save_pretrained(str(partial_folder))
        write_tensors(partial_folder / WEIGHTS, tensors, torch.float32)


def is_adapter_folder(folder: Path) -> bool:
    """Whether `folder` holds an adapter."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def refuse_other_than_adapter(folder: Path) -> None:
    """Checks that an adapter may be written to `folder`: it is absent, empty, or holds an adapter and nothing else.

    Raises:
        WeightsError: it does not.
    """
    others = sorted({path.name for path in folder.iterdir()} - {CONFIG, WEIGHTS}) if folder.is_dir() else []
    if others or (folder.exists() and not folder.is_dir()):
        held = f"holds {', '.join(others[:MAX_LISTED])}" if others else "is no folder"
        raise WeightsError(f"{folder} {held}, so it is not replaced by an adapter. Remove it or name another output.")


def read_adapter(folder: Path, spec: ModelSpec, adapters: Adapters) -> dict[str, Callable[[], Sliceable]]:
    """A loader for each tensor of an adapter, by this library's names; of parts that learnt whole, too.

    Raises:
        WeightsError: it cannot be read, is of other settings than `adapters`, or lacks or has more than these need.
    """
    _check_settings(folder, spec, adapters)
    disk, to_disk = WeightsFolder(folder / WEIGHTS), Spelling(spec)
    on_disk = {_ours(name, spec): name for name in disk}
    wanted = {name for name, _ in outline(spec, adapters=adapters).named_parameters() if is_adapter(name)}
    found = {name for name in on_disk if is_adapter(name)}
    if wanted != found:
        surplus, missing = [on_disk[name] for name in found - wanted], [to_disk(name) for name in wanted - found]
        raise WeightsError(
            f"{folder} is an adapter of other layers than the config names.\n  tensors for which the config has no "
            f"layer: {_some(surplus)}\n  tensors that it lacks: {_some(missing)}"
        )
    return {name: partial(disk.__getitem__, there) for name, there in on_disk.items()}


def _some(found: Collection[str]) -> str:
    """How many names there are, and the first of them."""
    listed = ", ".join(sorted(found)[:MAX_LISTED])
    return f"{len(found)}{', e.g. ' if len(found) > MAX_LISTED else ': ' if found else ''}{listed}"


def _check_settings(folder: Path, spec: ModelSpec, adapters: Adapters) -> None:
    from peft import LoraConfig, PeftConfig

    if not (folder / CONFIG).is_file():
        raise WeightsError(f"{folder} has no {CONFIG}: it is no adapter of peft's.")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise WeightsError(f"{folder / CONFIG} cannot be read: {error}") from error
    if not isinstance(config, LoraConfig):
        raise WeightsError(f"{folder} is an adapter of type {config.peft_type}; expected LORA.")
    expected = peft_config(adapters, spec)
    differing = [
        f"\n  {key}: {_plain(getattr(config, key))} there, {_plain(getattr(expected, key))} in the config"
        for key in ADOPTED
        if _plain(getattr(config, key)) != _plain(getattr(expected, key))
    ]
    if differing:
        raise WeightsError(f"{folder} is an adapter of other settings:" + "".join(differing))
    if config.init_lora_weights not in BASE_KEPT:
        raise WeightsError(
            f"{folder}: init_lora_weights is {config.init_lora_weights!r}, which may have changed the weights that the "
            f"adapter is beside, so that the model's folder does not hold them; read are {list(BASE_KEPT)}. Have peft "
            "convert it to a plain one (path_initial_model_for_weight_conversion), or merge it into its model."
        )


ADOPTED = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_dora", "use_rslora", "bias", "fan_in_fan_out")
"""peft's settings that decide what an adapter's numbers mean; which layers it is of, its tensors' names tell."""

BASE_KEPT = (True, False, "gaussian", "eva", "orthogonal")
"""How adapters may have started: peft then leaves the weights beside them alone, and with pissa, olora, corda, loftq
and others it does not (peft's tuners/lora/layer.py)."""


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


class Spelling:
    """From this library's names to those of an adapter for the installed transformers' model."""

    def __init__(self, spec: ModelSpec) -> None:
        self._multimodal = spec.vision is not None
        self._tower = _tower_prefix(spec)

    def __call__(self, name: str) -> str:
        name = name.replace(f".{NAME}.", ".").replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
        if not self._multimodal:
            return PREFIX + names.to_language_only(name)
        for ours, theirs in (
            ("language_model.lm_head.", "lm_head."),
            ("language_model.model.", "model.language_model."),
            (names.NEWLINE, f"model.{names.NEWLINE_ON_DISK}"),  # of no module, yet peft loads it by its name
            (PARTS["projector"], "model.multi_modal_projector."),
            (names.CANONICAL_VISION, self._tower),
        ):
            if name.startswith(ours):
                return PREFIX + theirs + name.removeprefix(ours)
        raise AssertionError(name)


def _tower_prefix(spec: ModelSpec) -> str:
    """Where the installed transformers' LLaVA has its tower's layers: the tower holds them, or its `vision_model`."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

    if spec.vision is None:
        return ""
    with torch.device("meta"):
        tower = (
            CLIPVisionModel(CLIPVisionConfig(num_hidden_layers=1))
            if spec.vision.family == "clip"
            else SiglipVisionModel(SiglipVisionConfig(num_hidden_layers=1))
        )
    return "model.vision_tower." + ("vision_model." if hasattr(tower, "vision_model") else "")


def _ours(name: str, spec: ModelSpec) -> str:
    naming = names.LANGUAGE if spec.vision is None else names.LLAVA
    canonical = naming.canonical(name.removeprefix(PREFIX)) or name
    if canonical.endswith(".lora_magnitude_vector"):
        return f"{canonical}.{NAME}.weight"
    module, kind, leaf = canonical.rpartition(".weight")
    return f"{module}.{NAME}{kind}{leaf}" if is_adapter(canonical) else canonical
