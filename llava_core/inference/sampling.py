"""From logits to the next token.

Shapes: B rows, V vocabulary, T tokens so far.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import LongTensor, Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llava_core.errors import ConfigError


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are generated.

    Attributes:
        max_new_tokens: an answer's most tokens.
        temperature: divides the logits before sampling; 0 takes the most probable token each time.
        top_p: sample from the most probable tokens that together reach this probability; 1 from all.
        top_k: sample from this many most probable tokens; None from all.
        repetition_penalty: divides the positive logits of tokens that occur in the prompt or the answer, and multiplies
            the negative ones. Source: arXiv:1909.05858, section 4.1.
        seed: of sampling; a prompt's answer depends on this and the prompt's id, not on its neighbours in a batch.

    Raises:
        ConfigError: a value out of range, or one that greedy decoding would ignore.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        _require(0 <= self.temperature < math.inf, "temperature", self.temperature, "0 for greedy decoding, or above")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _require(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "at least 1, or none")
        positive = 0 < self.repetition_penalty < math.inf
        _require(positive, "repetition_penalty", self.repetition_penalty, "above 0; 1 for no penalty")
        if self.temperature == 0 and (self.top_p != 1 or self.top_k is not None):
            raise ConfigError(
                f"temperature = 0 takes the most probable token, so top_p = {self.top_p} and top_k = {self.top_k} "
                "would change nothing; leave them out or set temperature above 0."
            )


def _require(ok: bool, key: str, found: object, expected: str) -> None:
    if not ok:
        raise ConfigError(f"{key} = {found}; expected {expected}.")


def build_processors(settings: GenerationSettings) -> LogitsProcessorList:
    """transformers' own processors, in the order of its `generate`."""
    processors = LogitsProcessorList()
    if settings.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(float(settings.repetition_penalty)))
    if settings.temperature not in (0, 1):
        processors.append(TemperatureLogitsWarper(float(settings.temperature)))
    if settings.top_k is not None:
        processors.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p != 1:
        processors.append(TopPLogitsWarper(float(settings.top_p)))
    return processors


class Sampler:
    """Chooses each row's next token. Every row draws from a generator of its own.

    Args:
        prompts: each row's token ids, [T] int64 on the host.
        ids: each row's id, which seeds its generator together with the settings' seed.
    """

    def __init__(
        self, settings: GenerationSettings, prompts: Sequence[Tensor], ids: Sequence[str], device: torch.device
    ) -> None:
        self._processors = build_processors(settings)
        self._generators: list[torch.Generator] | None = None
        if settings.temperature > 0:
            self._generators = [_generator(settings.seed, row_id) for row_id in ids]
        self._seen = _aligned(prompts).to(device)

    def choose(self, logits: Tensor) -> list[int]:
        """The next token of each row from its logits [B, V]."""
        scores = self._processors(cast(LongTensor, self._seen), logits.float())
        if self._generators is None:
            chosen = scores.argmax(-1)
        else:
            # Drawn on the host, so that a seed gives the same draws on any hardware.
            rows = zip(scores.softmax(-1).cpu(), self._generators, strict=True)
            drawn = [torch.multinomial(row, 1, generator=generator) for row, generator in rows]
            chosen = torch.cat(drawn).to(self._seen.device)
        self._seen = torch.cat((self._seen, chosen[:, None]), dim=1)
        return chosen.tolist()

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these."""
        self._seen = self._seen[list(rows)]
        if self._generators is not None:
            self._generators = [self._generators[row] for row in rows]


def _aligned(prompts: Sequence[Tensor]) -> Tensor:
    """Rows of equal length, [B, T]: lengthened in front by their own first token, which occurs in them already."""
    longest = max(prompt.numel() for prompt in prompts)
    return torch.stack([torch.cat((p[:1].expand(longest - p.numel()), p)) for p in prompts])


def _generator(seed: int, row_id: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {row_id}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
