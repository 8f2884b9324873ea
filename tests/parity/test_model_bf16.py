"""bf16: our error against fp32 beside the error that transformers makes in bf16, from the same rounded weights."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from llava_core.model.llava import Llava
from tests.parity.support import (
    OP_SETS,
    SEEDS,
    build_examples,
    build_examples_batch,
    build_hf,
    build_ours,
    mean_loss,
    run_hf,
)

CASES = ("clip", "siglip", "llama3_rope", "mistral_window", "tied", "text_llama", "text_mistral_window")

# Both round the same values at nearly the same places (measured ratios: 0.97 to 1.05 for logits, 0.87 to 1.15 for
# gradients); one more rounding a layer would give 1.4.
LOGITS_ERROR_RATIO = 1.25
GRADIENT_ERROR_RATIO = 1.3
# Two independent errors of equal size are sqrt(2) apart; measured at most 1.1, for many roundings agree.
DISTANCE_RATIO = 1.4
# Logits are wrong by about 0.01 each (rms), and the loss averages that over some twenty labels; measured 0.006.
LOSS_TOLERANCE = 0.02

every_case = pytest.mark.parametrize("case", CASES)
every_seed = pytest.mark.parametrize("seed", SEEDS)
every_op_set = pytest.mark.parametrize("ops", OP_SETS)


@cache
def exact_and_hf(case, seed):
    """Model (fp32, weights rounded to bf16), spec, samples, and (logits, loss, gradients) in fp32 and in bf16."""
    model, spec = build_hf(case, seed)
    model = model.bfloat16().float()
    examples = build_examples(spec, seed)
    runs = []
    for dtype in (torch.float32, torch.bfloat16):
        logits, loss, gradients = run_hf(model.to(dtype), examples)
        runs.append((torch.cat(logits), loss, {name: g for name, g in gradients.items() if g is not None}))
    return model.float(), spec, examples, *runs


def build_and_batch(case, seed, ops) -> tuple[Llava, object]:
    model, spec, examples, *_ = exact_and_hf(case, seed)
    ours = build_ours(model, spec, ops=ops, compute_dtype=torch.bfloat16)
    return ours, build_examples_batch(spec, examples)


def rms(x: Tensor) -> float:
    return float(x.float().square().mean().sqrt())


def gradient_error(gradients: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Root of the summed squares of each parameter's relative error; key biases, whose gradient is zero, left out."""
    names = [name for name in exact if not name.endswith("k_proj.bias")]
    return sum(rms(gradients[n].float() - exact[n]) ** 2 / rms(exact[n]) ** 2 for n in names) ** 0.5


@every_case
@every_seed
@every_op_set
def test_logits(case, seed, ops):
    exact, theirs = (run[0] for run in exact_and_hf(case, seed)[3:])
    model, batch = build_and_batch(case, seed, ops)
    with torch.no_grad():
        ours = model.logits(model.hidden_states(batch)).cpu()
    assert ours.dtype == torch.bfloat16
    hf_error = rms(theirs - exact)
    assert rms(ours - exact) <= LOGITS_ERROR_RATIO * hf_error
    assert rms(ours.float() - theirs.float()) <= DISTANCE_RATIO * hf_error


@pytest.mark.device
@every_case
@every_op_set
def test_loss_and_gradients(case, ops):
    (_, exact_loss, exact), (_, _, theirs) = exact_and_hf(case, 0)[3:]
    model, batch = build_and_batch(case, 0, ops)
    loss = mean_loss(model, batch)
    loss.backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    assert loss.dtype == torch.float32
    assert abs(float(loss.detach().cpu() - exact_loss)) <= LOSS_TOLERANCE
    assert gradient_error(gradients, exact) <= GRADIENT_ERROR_RATIO * gradient_error(theirs, exact)


@pytest.mark.device
def test_trained_weights_are_fp32_and_activations_bf16():
    model, batch = build_and_batch("clip", 0, "backend")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.hidden_states(batch).dtype == torch.bfloat16
