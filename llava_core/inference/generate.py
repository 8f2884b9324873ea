"""Batched generation: the prompts run packed, as in training; then one token a row and step through a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llava_core.data.batch import Example
from llava_core.data.packing import build_batch
from llava_core.errors import ConfigError
from llava_core.inference.cache import Cache
from llava_core.inference.sampling import GenerationSettings, Sampler
from llava_core.model.llava import Llava

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Stop:
    """What ends an answer. The token that does so is the answer's last.

    Attributes:
        ids: tokens that end it.
        strings: texts that end it, wherever they come to stand in it.
        tokenizer: decodes the answer, to find `strings`.
    """

    ids: frozenset[int]
    strings: tuple[str, ...] = ()
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.strings and self.tokenizer is None:
            raise ConfigError(f"the stop strings {self.strings} can only be found with a tokenizer; give it.")

    def reached(self, tokens: Sequence[int]) -> bool:
        """Whether the last of these tokens ends the answer."""
        if tokens[-1] in self.ids:
            return True
        if not self.strings or self.tokenizer is None:
            return False
        # A token is at least one byte, so that an end mark reaches back no further than its bytes; one token more,
        # because a decoder drops the space at the start of what it is given.
        reach = max(len(string.encode()) for string in self.strings) + 1
        text = self.tokenizer.decode(
            list(tokens[-reach:]), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return any(string in text for string in self.strings)


@torch.no_grad()
def generate(model: Llava, prompts: Sequence[Example], settings: GenerationSettings, stop: Stop) -> list[list[int]]:
    """Each prompt's answer as token ids, the one that ended it included.

    An answer that is cut, at `max_new_tokens` or where the model's positions end, has no such token.

    Rows that are done stop to cost anything when half of the rows are; no row's answer depends on the others, except
    through the rounding of sums whose order may change with the batch's size.

    Args:
        prompts: with nothing supervised, each shorter than the model's positions.
    """
    device = model.language_model.model.embed_tokens.weight.device
    image_size = model.spec.vision.image_size if model.spec.vision else 1
    batch = build_batch(prompts, pad_id=0, image_size=image_size).to(device)
    lengths = [prompt.length for prompt in prompts]
    limits = [min(settings.max_new_tokens, model.spec.text.max_positions - length) for length in lengths]
    cache = Cache(model.spec.text, lengths, max(limits), model.compute_dtype, device)
    sampler = Sampler(settings, [prompt.tokens for prompt in prompts], [prompt.id for prompt in prompts], device)

    hidden = model.hidden_states(batch, batch.cu_seqlens[1:].long() - 1, cache)
    cache.advance()
    answers: list[list[int]] = [[] for _ in prompts]
    unfinished = set(range(len(prompts)))
    rows = list(range(len(prompts)))  # the prompt of each row of the cache
    positions = torch.tensor(lengths, device=device)
    for step in range(max(limits)):
        chosen = sampler.choose(model.logits(hidden))
        for row, token in zip(rows, chosen, strict=True):
            if row in unfinished:
                answers[row].append(token)
                if stop.reached(answers[row]) or len(answers[row]) == limits[row]:
                    unfinished.remove(row)
        if not unfinished:
            break
        if 2 * len(unfinished) <= len(rows):
            # Not at each row that ends: what is kept is copied.
            kept = [index for index, row in enumerate(rows) if row in unfinished]
            index = torch.tensor(kept, device=device)
            cache.keep(index)
            sampler.keep(kept)
            positions = positions[index]
            rows, chosen = [rows[i] for i in kept], [chosen[i] for i in kept]
        hidden = _decode(model, torch.tensor(chosen, device=device), positions + step, cache)
    return answers


def _decode(model: Llava, tokens: Tensor, positions: Tensor, cache: Cache) -> Tensor:
    """Hidden states [B, D] of one new token [B] a row at `positions` [B]."""
    x = model.embed(tokens[:, None])
    hidden = model.language_model.model(x, positions[:, None], cache.mask, cache)
    cache.advance()
    return hidden[:, 0]
