"""Generation against transformers' own `generate`: the same tokens from the same weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from llava_core.backend import OpSet
from llava_core.data.batch import Example
from llava_core.engine.opset import Use, build_ops
from llava_core.inference.generate import Stop, generate
from llava_core.inference.sampling import GenerationSettings, build_processors
from llava_core.model.llava import Llava
from llava_core.model.spec import ModelSpec
from llava_core.testing.models import IMAGE_TOKEN_ID, random_example
from tests.hardware import hardware
from tests.parity.support import TEXT_SAMPLES, build_hf, build_ours, hf_inputs

NEVER = Stop(frozenset())
# No image, one, two, an image first; the window of `mistral_window` is 5 and that of `text_mistral_window` 6.
IMAGE_PROMPTS = ((13,), (4, 9), (3, 2, 6), (1, 5), (20,))
CASES = (
    "clip",
    "siglip",
    "anyres",
    "grouped_queries",
    "tied",
    "llama3_rope",
    "mistral_window",
    "text_llama",
    "text_mistral_window",
)


def build(case: str, ops: str = "reference") -> tuple[PreTrainedModel, Llava, list[Example]]:
    reference, spec = build_hf(case, seed=0)
    model = build_ours(reference, spec, trainable=())
    if ops == "backend":
        model = rebuilt(model, spec)
    pieces = IMAGE_PROMPTS if spec.vision else (*TEXT_SAMPLES, (9,))
    examples = [random_example(spec, lengths, seed=i, pad_id=IMAGE_TOKEN_ID) for i, lengths in enumerate(pieces)]
    return reference, model, [replace(e, supervised=torch.zeros_like(e.supervised)) for e in examples]


def rebuilt(model: Llava, spec: ModelSpec) -> Llava:
    """The model with the kernels that the backend chooses for inference."""
    use = Use(torch.float32, frozenset(), spec.text.max_positions, deterministic=False)
    ops, _ = build_ops(spec, hardware().backend, use)
    assert ops != OpSet.of({})
    other = Llava(spec, ops, torch.float32).to(hardware().device)
    other.load_state_dict(model.state_dict())
    return other


def expected(model: PreTrainedModel, example: Example, **options: Any) -> Any:
    """What transformers generates for one prompt alone."""
    inputs = hf_inputs(model, example)
    del inputs["labels"]
    settings = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": None, "pad_token_id": 0} | options
    mask = torch.ones_like(inputs["input_ids"])
    return model.generate(**inputs, attention_mask=mask, **settings)


def new_tokens(output: Tensor, example: Example) -> list[int]:
    return output[0, example.length :].tolist()


@pytest.mark.device
@pytest.mark.parametrize("ops", ["reference", "backend"])
@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens(case: str, ops: str) -> None:
    reference, model, examples = build(case, ops)
    ours = generate(model, examples, GenerationSettings(max_new_tokens=24), NEVER)
    assert len({len(set(answer)) for answer in ours}) > 1  # not one token for ever
    assert ours == [new_tokens(expected(reference, e), e) for e in examples]


@pytest.mark.device
def test_rows_stop_at_their_end_tokens() -> None:
    reference, model, examples = build("clip")
    free = [new_tokens(expected(reference, e), e) for e in examples]
    # One row's third token, another's tenth; the others may or may not meet them.
    ends = [free[0][2], free[1][9]]
    ours = generate(model, examples, GenerationSettings(max_new_tokens=24), Stop(frozenset(ends)))
    assert ours == [new_tokens(expected(reference, e, eos_token_id=ends), e) for e in examples]
    assert len({len(answer) for answer in ours}) > 2
    assert all(answer[-1] in ends for answer in ours if len(answer) < 24)


@pytest.mark.device
@pytest.mark.parametrize("penalty", [1.4, 0.8])
def test_repetition_penalty(penalty: float) -> None:
    reference, model, examples = build("mistral_window")
    settings = GenerationSettings(max_new_tokens=24, repetition_penalty=penalty)
    ours = generate(model, examples, settings, NEVER)
    assert ours == [new_tokens(expected(reference, e, repetition_penalty=penalty), e) for e in examples]
    assert ours != generate(model, examples, GenerationSettings(max_new_tokens=24), NEVER)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 0.5, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.3},
    ],
)
def test_sampling_draws_from_the_same_distribution(options: dict[str, Any]) -> None:
    reference, _, examples = build("text_llama")
    example = examples[0]
    out = expected(
        reference,
        example,
        **{"do_sample": True, "top_k": 0, **options},
        max_new_tokens=12,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    processors = build_processors(GenerationSettings(**options))
    for step, (logits, scores) in enumerate(zip(out.logits, out.scores, strict=True)):
        seen: Any = out.sequences[:, : example.length + step]
        assert torch.equal(processors(seen, logits), scores)


@pytest.mark.device
def test_an_answer_does_not_depend_on_the_batch() -> None:
    _, model, examples = build("clip")
    # Rows end at different times, so that rows leave the batch on the way.
    stop = Stop(frozenset(range(1, 7)))
    for settings in (
        GenerationSettings(max_new_tokens=24),
        GenerationSettings(max_new_tokens=24, temperature=1.2, top_p=0.9, repetition_penalty=1.2, seed=5),
    ):
        together = generate(model, examples, settings, stop)
        assert generate(model, examples[::-1], settings, stop) == together[::-1]
        assert [generate(model, [e], settings, stop)[0] for e in examples] == together
        assert len({len(answer) for answer in together}) > 2
    other_seed = generate(model, examples, replace(settings, seed=6), stop)
    assert other_seed != together
