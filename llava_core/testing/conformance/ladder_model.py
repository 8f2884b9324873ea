"""The tiny LLaVA that the ladder trains, the same on every backend."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from llava_core.backend import OpSet
from llava_core.data.batch import Batch, Labelled
from llava_core.data.packing import build_batch
from llava_core.engine.hardware import Hardware
from llava_core.engine.loss import label_weights
from llava_core.engine.opset import Use, build_ops
from llava_core.engine.torch_engine import OptimizerSettings, StepResult, TorchEngine
from llava_core.testing.models import classic_tensors, random_example, tiny_llava_config, tiny_model, tiny_text_config
from llava_core.weights.hf_config import model_spec
from llava_core.weights.load import load_model
from llava_core.weights.source import ModelSource

TRAINED = frozenset({"projector", "language"})
LEARNING_RATE = 1e-3
PIECES = ((4, 9), (3, 2, 6), (12,), (5, 5), (2, 20), (17,))
"""Lengths of the texts between a sample's images: one, two and none, all lengths different."""

MICRO_BATCHES = ((0, 1, 2), (3, 4, 5))
IMAGE_SIZE = 24
LAYER = re.compile(r".*\.layers\.\d+|multi_modal_projector|language_model\.model\.norm")
"""Names of the modules whose outputs are compared."""


@dataclass(frozen=True)
class Ladder:
    """The tiny model on one device."""

    engine: TorchEngine

    def micro_batches(self, step: int) -> list[tuple[Batch, Tensor]]:
        """A step's micro-batches with the weights of their labels, on the host; two sets of samples take turns."""
        samples = [random_example(self.engine.model.spec, p, seed=100 * (step % 2) + i) for i, p in enumerate(PIECES)]
        built = [build_batch([samples[i] for i in chosen], pad_id=0, image_size=IMAGE_SIZE) for chosen in MICRO_BATCHES]
        return list(zip(built, label_weights("token_mean", built, Labelled.of(built)), strict=True))

    def step(self, number: int) -> StepResult:
        """One optimizer step."""
        return self.engine.step([batch for batch, _ in self.micro_batches(number)], 1.0)

    def backward(self, batches: Sequence[tuple[Batch, Tensor]]) -> None:
        """Forward and backward over batches on the device, without reading anything back."""
        for batch, weights in batches:
            self.engine.model(batch, weights).backward()
        self.engine.optimizer.zero_grad()

    @torch.no_grad()
    def activations(self) -> dict[str, Tensor]:
        """Each layer's output for the first micro-batch, in float64 on the host, in the order they are computed."""
        found: dict[str, Tensor] = {}
        modules = [(n, m) for n, m in self.engine.model.named_modules() if LAYER.fullmatch(n)]
        hooks = [
            module.register_forward_hook(
                lambda _, __, out, name=name: found.update({name: out.to("cpu", torch.float64)})
            )
            for name, module in modules
        ]
        try:
            self.engine.model.hidden_states(self.micro_batches(0)[0][0].to(self.engine.hardware.device))
        finally:
            for hook in hooks:
                hook.remove()
        return found


def build_ladder(hardware: Hardware, dtype: torch.dtype, *, reference: bool = False) -> Ladder:
    """The model with its optimizer, on the backend's kernels or on the references."""
    source = _source()
    use = Use(dtype, TRAINED, max_length=64, deterministic=True)
    ops = OpSet.of({}) if reference else build_ops(source.spec, hardware.backend, use)[0]
    model = load_model(source, ops, compute_dtype=dtype, device=hardware.device, trainable=TRAINED)
    settings = OptimizerSettings(dict.fromkeys(TRAINED, LEARNING_RATE), 0.01, (0.9, 0.999), 1e-8, 1.0)
    return Ladder(TorchEngine(model, hardware, settings, "token_mean"))


@lru_cache(maxsize=1)
def _source() -> ModelSource:
    """Grouped heads, every weight scaled so that activations are near one."""
    config = tiny_llava_config(text=tiny_text_config(num_key_value_heads=2))
    tensors = classic_tensors(tiny_model(config))
    loaders: dict[str, Callable[[], Tensor]] = {name: partial(tensors.__getitem__, name) for name in tensors}
    return ModelSource(model_spec(config, Path("tiny")), loaders, Path(), None, ())
