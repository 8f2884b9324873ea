"""Small models with real tokenizers, for the tests of exports and of generation."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llava_core.data.images import Aspect, ImageProcessor
from llava_core.model.llava import Llava
from llava_core.model.spec import ModelSpec
from llava_core.testing.models import tiny_llava_config, tiny_model, tiny_text_config, tiny_vision_config
from llava_core.testing.tokenizers import train_llama3_tokenizer, train_llama_tokenizer
from llava_core.weights.hf_config import model_spec
from tests.parity.support import build_ours
from tests.unit.data.original_rules import SYSTEMS

SPOKEN = ["Answer the questions.", "USER: What is this? ASSISTANT: A cat.\n"]
CORPUS = [SYSTEMS["v1"], SYSTEMS["llama_2"], SYSTEMS["llama_3"], *SPOKEN] * 3
VOCAB_SIZE = 384
SIZES = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2}
PROCESSOR = ImageProcessor(resize=24, crop=(24, 24))

CONFIGS: dict[str, Any] = {
    "clip": lambda: tiny_llava_config(tiny_text_config(**SIZES)),
    "clip_full": lambda: tiny_llava_config(
        tiny_text_config(**SIZES), tiny_vision_config(hidden_act="gelu"), vision_feature_select_strategy="full"
    ),
    "wide": lambda: tiny_llava_config(tiny_text_config(**SIZES), tiny_vision_config(hidden_size=64)),
    "siglip": lambda: tiny_llava_config(
        tiny_text_config(**SIZES), tiny_vision_config("siglip"), vision_feature_select_strategy="full"
    ),
    "tied": lambda: tiny_llava_config(
        tiny_text_config(**SIZES, tie_word_embeddings=True), tie_word_embeddings=True, vision_feature_layer=-1
    ),
    "mistral": lambda: tiny_llava_config(
        tiny_text_config("mistral", **SIZES, num_key_value_heads=2, sliding_window=7, head_dim=24)
    ),
    "llama3_rope": lambda: tiny_llava_config(
        tiny_text_config(
            **SIZES,
            num_key_value_heads=1,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256,
            },
        )
    ),
    "text_llama": lambda: tiny_text_config(**SIZES, tie_word_embeddings=True),
    "text_mistral": lambda: tiny_text_config("mistral", **SIZES, sliding_window=5, num_key_value_heads=2),
}


@dataclass(frozen=True)
class Parts:
    """A model here, and the random Hugging Face model whose weights it has."""

    model: Llava
    reference: PreTrainedModel
    spec: ModelSpec


@cache
def tokenizer(kind: Literal["legacy", "plain", "llama_3"] = "plain") -> PreTrainedTokenizerBase:
    """Llama's with `legacy` True or False, or Llama 3's byte-level one; none has `<image>`."""
    folder = Path(tempfile.mkdtemp(prefix="llava-core-test-"))
    if kind == "llama_3":
        return train_llama3_tokenizer(folder, CORPUS, vocab_size=300)
    return train_llama_tokenizer(folder, CORPUS, VOCAB_SIZE, legacy=kind == "legacy")


def parts(case: str, projector: str = "mlp2x_gelu") -> Parts:
    """A model composed from its parts: no image token is assigned yet."""
    return _parts(case, projector)


@cache
def _parts(case: str, projector: str) -> Parts:
    config = CONFIGS[case]()
    reference = tiny_model(config, seed=3)
    spec = replace(model_spec(config, Path(case)), image_token_id=None)
    if projector != "mlp2x_gelu":
        spec = replace(spec, projector=projector)
        reference.model.multi_modal_projector = _layers(spec)
    return Parts(build_ours(reference, spec, trainable=()), reference, spec)


def _layers(spec: ModelSpec) -> nn.Module:
    """The parameters of a projector, under the names that they have here."""
    from llava_core.model.projector import Projector

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Projector(spec)


def picture(seed: int = 0, size: tuple[int, int] = (40, 31)) -> Image.Image:
    """A random image that is not square."""
    levels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(levels, "RGB")


def processor(aspect: Aspect = "square") -> ImageProcessor:
    return replace(PROCESSOR, aspect=aspect)
