"""Adapters against peft's own on transformers' model: loss, gradients, a step, and folders to and fro."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from llava_core.data.batch import Example
from llava_core.engine.opset import Use, build_ops
from llava_core.model.adapters import Adapters, LowRank, peft_config
from llava_core.model.llava import Llava
from llava_core.model.spec import ModelSpec
from llava_core.weights.adapter_folder import learnt_names, put_adapters, write_adapter
from llava_core.weights.export import whole_weights
from llava_core.weights.load import load_model, outline
from llava_core.weights.merged import merged
from llava_core.weights.source import ModelSource
from tests.hardware import hardware
from tests.parity.support import build_examples, build_examples_batch, build_hf, hf_inputs, mean_loss, ours_name

LANGUAGE = LowRank(4, 6, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
VISION = LowRank(3, 5, ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"))
CASES = {
    "both": ("clip", {"language": LANGUAGE, "vision": VISION}, False),
    "language": ("grouped_queries", {"language": LANGUAGE}, False),
    "some_layers": ("tied", {"language": LowRank(2, 8, ("q_proj", "down_proj"))}, False),
    "siglip_tower": ("siglip", {"vision": VISION}, False),
    "text_alone": ("text_mistral_window", {"language": LANGUAGE}, False),
    "dora": ("clip", {"language": LANGUAGE, "vision": VISION}, True),
}
# As of tests/parity/test_model_gradients.py: fp32 sums in another order.
GRADIENT_TOLERANCE = 2e-5
LOGIT_TOLERANCE = 2e-5


@dataclass(frozen=True)
class Pair:
    """The same model with the same adapters, in peft and here."""

    hf: PreTrainedModel
    theirs: PeftModel
    ours: Llava
    spec: ModelSpec
    adapters: Adapters
    trainable: tuple[str, ...]
    examples: list[Example]


def build_pair(case: str, folder: Path, dtype: torch.dtype = torch.float32) -> Pair:
    """peft makes the adapters, with values that change what the model says, and saves them; here they are read.

    Args:
        dtype: that every value can be rounded to without loss, and in which this library computes.
    """
    model_case, parts, dora = CASES[case]
    hf, spec = build_hf(model_case, 0)
    hf = hf.to(dtype).float()
    adapters = Adapters(parts, dora=dora)
    beside = ("projector",) if spec.vision is not None else ()
    config = peft_config(adapters, spec)
    config.modules_to_save = ["multi_modal_projector"] if beside else None
    theirs = get_peft_model(copy.deepcopy(hf), config)
    vary(theirs)
    theirs.to(dtype).float()
    theirs.save_pretrained(str(folder))
    source = put_adapters(source_of(hf, spec), adapters, folder, (*parts, *beside))
    ours = load(source, (*parts, *beside), dtype)
    return Pair(hf, theirs, ours, spec, adapters, (*parts, *beside), build_examples(spec, 0))


@torch.no_grad()
def vary(model: PeftModel) -> None:
    """Away from where adapters start, at which they add nothing, and the projector from where it was."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.05 if "lora_magnitude" in name else 0.1))


def source_of(hf: PreTrainedModel, spec: ModelSpec) -> ModelSource:
    tensors = {ours_name(hf, name): p.detach().clone() for name, p in hf.named_parameters()}
    loaders: dict[str, Any] = {n: (lambda t=p: t) for n, p in tensors.items() if ".vision_model.head." not in n}
    return ModelSource(spec, loaders, Path(), None, ())


def load(source: ModelSource, trainable: tuple[str, ...], dtype: torch.dtype) -> Llava:
    use = Use(dtype, frozenset(trainable), 64, deterministic=True)
    ops, _ = build_ops(source.spec, hardware().backend, use)
    parts = frozenset(trainable)
    return load_model(source, ops, compute_dtype=dtype, device=hardware().device, trainable=parts)


@pytest.fixture
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Pair:
    return build_pair(request.param, tmp_path / "adapter")


every_case = pytest.mark.parametrize("pair", CASES, indirect=True)


def their_loss(pair: Pair) -> Tensor:
    labels = sum(example.num_labels for example in pair.examples)
    losses = []
    for example in pair.examples:
        losses.append(pair.theirs(**hf_inputs(pair.hf, example)).loss * example.num_labels / labels)
    return torch.stack(losses).sum()


def their_gradients(pair: Pair) -> dict[str, Tensor]:
    """By this library's names."""
    return {spelt(pair, name): p.grad for name, p in pair.theirs.named_parameters() if p.requires_grad}


def spelt(pair: Pair, name: str) -> str:
    name = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
    return ours_name(pair.hf, name)


@pytest.mark.device
@every_case
def test_loss_and_gradients_are_pefts(pair: Pair) -> None:
    loss, expected = mean_loss(pair.ours, build_examples_batch(pair.spec, pair.examples)), their_loss(pair)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6)
    wanted = their_gradients(pair)
    found = {name: p.grad for name, p in pair.ours.named_parameters() if p.requires_grad}
    assert found.keys() == wanted.keys()
    wrong = {}
    for name, gradient in wanted.items():
        assert found[name] is not None
        assert gradient is not None
        # The key projection of a biased key has a gradient by rounding alone in no case here: biases are frozen.
        error = float((found[name].cpu() - gradient).abs().max() / gradient.abs().max())
        if error > GRADIENT_TOLERANCE:
            wrong[name] = error
    assert not wrong
    assert all(p.grad is None for p in pair.ours.parameters() if not p.requires_grad)


@every_case
def test_a_step_is_that_of_torchs_adamw_on_pefts_model(pair: Pair) -> None:
    learning = {name: p for name, p in pair.ours.named_parameters() if p.requires_grad}
    theirs = {spelt(pair, name): p for name, p in pair.theirs.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in learning.items()}
    for parameters, loss in (
        (learning, mean_loss(pair.ours, build_examples_batch(pair.spec, pair.examples))),
        (theirs, their_loss(pair)),
    ):
        # A large eps: where a gradient is near zero, the sign of its rounding would else be a whole step.
        optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, eps=1e-3, weight_decay=0.1)
        loss.backward()
        optimizer.step()
    for name, parameter in learning.items():
        assert not torch.equal(parameter, before[name]), name
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-5, atol=1e-6)


@pytest.mark.device
@pytest.mark.parametrize("case", ["both", "dora"])
def test_in_bf16_logits_are_no_further_off_than_pefts(case: str, tmp_path: Path) -> None:
    """Beside fp32, from the same rounded values."""
    pair = build_pair(case, tmp_path / "adapter", torch.bfloat16)
    with torch.no_grad():
        exact, theirs = (
            torch.cat([model(**hf_inputs(model.base_model.model, e)).logits[0].float() for e in pair.examples])
            for model in (pair.theirs, copy.deepcopy(pair.theirs).bfloat16())
        )
        ours = pair.ours.logits(pair.ours.hidden_states(build_examples_batch(pair.spec, pair.examples)))
    assert ours.dtype == torch.bfloat16
    # As of tests/parity/test_model_bf16.py: both round at nearly the same places.
    assert rms(ours.cpu().float() - exact) <= 1.25 * rms(theirs - exact)


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


@every_case
def test_peft_reads_what_is_written(pair: Pair, tmp_path: Path) -> None:
    """Our folder on transformers' own model gives the same logits; nothing in it is left over or missing."""
    names = frozenset(learnt_names(pair.spec, pair.trainable, pair.adapters))
    weights = whole_weights(pair.ours, names)
    folder = tmp_path / "written"
    write_adapter(folder, pair.spec, pair.trainable, pair.adapters, weights, base=Path("base"))
    assert next(weights, None) is None
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    back = PeftModel.from_pretrained(copy.deepcopy(pair.hf), str(folder))
    given = {n: p for n, p in pair.theirs.named_parameters() if "lora_" in n or "modules_to_save" in n}
    read = {n: p for n, p in back.named_parameters() if "lora_" in n or "modules_to_save" in n}
    assert read.keys() == given.keys()
    for name, parameter in given.items():
        assert torch.equal(read[name], parameter), name


@every_case
def test_merged_weights_say_the_same(pair: Pair) -> None:
    plain = dict(zip(names_of(pair.spec), merged_weights(pair), strict=True))
    reference = pair.theirs.merge_and_unload()
    theirs = {ours_name(pair.hf, name): p for name, p in reference.named_parameters()}
    for name, weight in plain.items():
        # peft's merge, of the same fp32 numbers; here one sum more or less may be fused.
        torch.testing.assert_close(weight, theirs[name], rtol=1e-6, atol=1e-6)
    alone = load(
        ModelSource(pair.spec, {n: (lambda t=w: t) for n, w in plain.items()}, Path(), None, ()), (), torch.float32
    )
    batch = build_examples_batch(pair.spec, pair.examples)
    with torch.no_grad():
        found = alone.logits(alone.hidden_states(batch))
        expected = pair.ours.logits(pair.ours.hidden_states(batch))
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=LOGIT_TOLERANCE)


def names_of(spec: ModelSpec) -> list[str]:
    return [name for name, _ in outline(spec).named_parameters()]


def merged_weights(pair: Pair) -> list[Tensor]:
    return list(merged(outline(pair.spec, adapters=pair.adapters), whole_weights(pair.ours)))
