from __future__ import annotations

from typing import Any

import pytest
import torch

from llava_core.errors import ConfigError
from llava_core.inference.generate import Stop
from llava_core.inference.sampling import GenerationSettings, Sampler
from tests.hardware import hardware
from tests.unit.inference.support import tokenizer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"temperature": -0.5}, "temperature = -0.5"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p = 0.0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p = 1.5"),
        ({"temperature": 1.0, "top_k": 0}, "top_k = 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0"),
        ({"top_p": 0.9}, "would change nothing"),
        ({"top_k": 3}, "would change nothing"),
    ],
)
def test_settings_that_cannot_be_honoured(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GenerationSettings(**options)


@pytest.mark.device
def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    settings = GenerationSettings(temperature=0.8, top_k=3)
    rows = 4000
    sampler = Sampler(settings, [torch.tensor([0])] * rows, [str(row) for row in range(rows)], hardware().device)
    counts = (
        torch.bincount(torch.tensor(sampler.choose(logits.expand(rows, -1).to(hardware().device))), minlength=4) / rows
    )
    allowed = torch.tensor([1.0, 0.0, float("-inf"), 2.0])
    # Four standard deviations of a share of 4000 draws.
    torch.testing.assert_close(counts, (allowed / 0.8).softmax(0), atol=4 * 0.5 * rows**-0.5, rtol=0)
    assert counts[2] == 0


@pytest.mark.device
def test_a_repeated_token_is_penalised_in_its_own_row_alone() -> None:
    prompts = [torch.tensor([2, 5]), torch.tensor([1])]
    sampler = Sampler(GenerationSettings(repetition_penalty=2.0), prompts, ["a", "b"], hardware().device)
    logits = torch.tensor([[0.0, 1.0, 1.8, 0.0, 0.0, 1.9], [0.0, 1.9, 1.8, 0.0, 0.0, 1.0]], device=hardware().device)
    assert sampler.choose(logits) == [1, 2]
    assert sampler.choose(logits) == [5, 5]  # 1.9 / 2 and 1.8 / 2 against 1.0 / 2; 1.0 against 0.95 and 0.9
    sampler.keep([1])
    assert sampler.choose(logits[1:]) == [1]


def test_stop_strings_are_found_across_tokens() -> None:
    tok = tokenizer()
    stop = Stop(frozenset(), ("<|im_end|>", "é\n"), tok)
    for text, ends in (("A cat.<|im_end|>", True), ("A cat.<|im_end", False), ("caté\n", True), ("cate\n", False)):
        ids = tok(text, add_special_tokens=False)["input_ids"]
        assert stop.reached(ids) is ends
        assert not any(stop.reached(ids[:end]) for end in range(1, len(ids)))


def test_stop_strings_need_a_tokenizer() -> None:
    with pytest.raises(ConfigError, match="tokenizer"):
        Stop(frozenset(), ("###",))
