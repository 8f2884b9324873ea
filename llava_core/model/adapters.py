"""LoRA and DoRA: small matrices beside linear layers learn in their place. The layers are peft's own.

Sources: arXiv:2106.09685 (LoRA), arXiv:2402.09353 (DoRA).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from llava_core.model.freeze import PARTS
from llava_core.model.layers import Linear
from llava_core.model.llava import Llava
from llava_core.model.spec import ModelSpec

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

NAME = "default"
"""peft's own name for a model's only adapter."""


@dataclass(frozen=True)
class LowRank:
    """The adapters of a part.

    Attributes:
        alpha: their product is added times alpha / rank.
        targets: the linear layers that have one, in each layer of the part.
    """

    rank: int
    alpha: int
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Adapters:
    """What learns in place of a model's weights.

    Attributes:
        parts: `language`, `vision` or both.
        dropout: of what enters an adapter, in training.
        dora: each row's size learns apart from its direction.
    """

    parts: Mapping[str, LowRank]
    dropout: float = 0.0
    dora: bool = False


def attach(model: Llava, adapters: Adapters) -> None:
    """Put adapters beside the targets that `model`, or a stage of one, has; without values, where the
    device to make tensors on is the meta device."""
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    model.adapters = adapters
    names = [name for name, _ in model.named_parameters()]
    if not any(name.startswith(PARTS[part]) for part in adapters.parts for name in names):
        return  # a stage beside the part
    inject_adapter_in_model(peft_config(adapters, model.spec), model, NAME, low_cpu_mem_usage=True)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            _cast_on_use(module)


def peft_config(adapters: Adapters, spec: ModelSpec) -> LoraConfig:
    """The same in peft's terms, by patterns that fit this library's names and transformers'."""
    from peft import LoraConfig

    (_, first), *others = adapters.parts.items()
    of_others = {rf".*{re.escape(PARTS[part])}.*": given for part, given in others}
    return LoraConfig(
        r=first.rank,
        lora_alpha=first.alpha,
        rank_pattern={pattern: given.rank for pattern, given in of_others.items() if given.rank != first.rank},
        alpha_pattern={pattern: given.alpha for pattern, given in of_others.items() if given.alpha != first.alpha},
        lora_dropout=adapters.dropout,
        use_dora=adapters.dora,
        target_modules="|".join(_pattern(part, given, spec) for part, given in adapters.parts.items()),
    )


def _pattern(part: str, given: LowRank, spec: ModelSpec) -> str:
    targets = rf"\.(?:self_attn|mlp)\.(?:{'|'.join(given.targets)})"
    if part == "language":
        return rf"(?:(?!.*vision_tower).*layers\.\d+{targets})"  # alone it bears no name of its own
    assert spec.vision is not None
    # What no feature depends on would never learn.
    layers = "|".join(map(str, range(spec.vision.num_layers_run)))
    return rf"(?:.*vision_tower\..*layers\.(?:{layers}){targets})"


def _cast_on_use(layer: LoraLayer) -> None:
    """Have an adapter compute as this library's layers do: in the dtype of what comes in."""
    layer.cast_input_dtype_enabled = False
    for matrices in (layer.lora_A, layer.lora_B):
        assert isinstance(matrices, nn.ModuleDict)
        plain = matrices[NAME]
        assert isinstance(plain, nn.Linear)
        matrices[NAME] = Linear(plain.in_features, plain.out_features, bias=False)
