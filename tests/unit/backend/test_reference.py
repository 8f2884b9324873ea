"""The references themselves, against transformers, PyTorch and sums written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from llava_core.backend import CATALOGUE, MaskSpec
from llava_core.backend import reference as ops

DTYPES = [torch.float32, torch.bfloat16]
# In float64 the two sides differ by rounding in another order alone: about 1e-15 for values near 1.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def randn(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = False) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


@pytest.mark.parametrize("case", CATALOGUE["attention"].cases, ids=lambda case: case.name)
def test_attention_is_sdpas_math(case) -> None:
    q, k, v, mask, scale = case.make(torch.Generator().manual_seed(0))
    groups = q.shape[2] // k.shape[2]
    heads_first = [x.transpose(1, 2) for x in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2))]
    allowed = ops.attend_mask(mask, q.shape[1], k.shape[1], q.device)
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(*heads_first, attn_mask=allowed, scale=scale)
    torch.testing.assert_close(ops.attention(q, k, v, mask, scale), expected.transpose(1, 2), **EXACT)


def test_attention_is_the_papers_formula_with_grouped_heads() -> None:
    q, k, v = randn(2, 5, 6, 8), randn(2, 5, 2, 8), randn(2, 5, 2, 8)
    grouped = q.view(2, 5, 2, 3, 8)  # heads 0..2 read key head 0, heads 3..5 read key head 1
    scores = torch.einsum("bigrh,bjgh->bgrij", grouped, k) / 8**0.5
    causal = torch.ones(5, 5).triu(1).bool()
    weights = scores.masked_fill(causal, -torch.inf).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    expected = torch.einsum("bgrij,bjgh->bigrh", weights, v).reshape(2, 5, 6, 8)
    torch.testing.assert_close(ops.attention(q, k, v, MaskSpec.dense(causal=True), 8**-0.5), expected, **EXACT)


def test_attention_of_a_query_that_sees_nothing_is_zero() -> None:
    mask = MaskSpec.dense(causal=False, key_valid=torch.zeros(1, 3, dtype=torch.bool))
    out = ops.attention(randn(1, 2, 2, 4), randn(1, 3, 2, 4), randn(1, 3, 2, 4), mask, 0.5)
    assert torch.equal(out, torch.zeros(1, 2, 2, 4, dtype=torch.float64))


def test_attention_passes_gradcheck() -> None:
    q, k, v = randn(1, 4, 2, 3, grad=True), randn(1, 4, 1, 3, grad=True), randn(1, 4, 1, 3, grad=True)
    mask = MaskSpec.dense(causal=True, key_valid=torch.tensor([[False, True, True, True]]))
    assert torch.autograd.gradcheck(lambda *x: ops.attention(*x, mask, 0.7), (q, k, v))


def test_rms_norm_is_torchs_in_float64() -> None:
    x, weight = randn(3, 5, 16), randn(16)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5), F.rms_norm(x, (16,), weight, 1e-5), **EXACT)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_has_llamas_bits(dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(64, eps=1e-6).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = randn(3, 5, 64, dtype=dtype)
    assert torch.equal(ops.rms_norm(x, norm.weight, 1e-6), norm(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_has_llamas_bits(dtype: torch.dtype) -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    q, k = randn(2, 9, 4, 16, dtype=dtype), randn(2, 9, 2, 16, dtype=dtype)
    cos, sin = LlamaRotaryEmbedding(config)(q, torch.arange(9).expand(2, -1))
    assert cos.shape == (2, 9, 16)
    expected = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    actual = ops.rotary(q, k, cos, sin)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual, expected, strict=True))


def test_rotary_turns_pairs_of_the_halves_by_the_angle() -> None:
    x, angles = randn(1, 3, 1, 8), randn(1, 3, 4)
    plane = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles).unsqueeze(2)
    expected = torch.cat((plane.real, plane.imag), dim=-1)
    cos, sin = (f(angles).repeat(1, 1, 2) for f in (torch.cos, torch.sin))
    torch.testing.assert_close(ops.rotary(x, x, cos, sin)[0], expected, **EXACT)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_has_the_bits_of_llamas_mlp(dtype: torch.dtype) -> None:
    mlp = LlamaMLP(LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2)).to(dtype)
    x = randn(5, 16, dtype=dtype)
    assert torch.equal(mlp.down_proj(ops.swiglu(mlp.gate_proj(x), mlp.up_proj(x))), mlp(x))


def cross_entropy_inputs(num_labels: int, grad: bool = False) -> tuple[torch.Tensor, ...]:
    targets = torch.randint(0, 13, (num_labels,))
    return randn(num_labels, 6, grad=grad), randn(13, 6, grad=grad), targets, torch.rand(num_labels).double()


def test_linear_cross_entropy_is_the_weighted_sum_of_each_labels_loss() -> None:
    hidden, weight, targets, weights = cross_entropy_inputs(7)
    expected = sum(w * F.cross_entropy(h @ weight.T, t) for h, t, w in zip(hidden, targets, weights, strict=True))
    torch.testing.assert_close(ops.linear_cross_entropy(hidden, weight, targets, weights), expected, **EXACT)


def test_equal_weights_give_the_mean_that_models_are_trained_on() -> None:
    hidden, weight, targets, _ = cross_entropy_inputs(7)
    weights = torch.full((7,), 1 / 7, dtype=torch.float64)
    expected = F.cross_entropy(hidden @ weight.T, targets)
    torch.testing.assert_close(ops.linear_cross_entropy(hidden, weight, targets, weights), expected, **EXACT)


def test_linear_cross_entropy_passes_gradcheck() -> None:
    hidden, weight, targets, weights = cross_entropy_inputs(5, grad=True)
    assert torch.autograd.gradcheck(lambda h, w: ops.linear_cross_entropy(h, w, targets, weights), (hidden, weight))


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_no_labels_give_a_zero_with_zero_gradients(dtype: torch.dtype) -> None:
    hidden, weight = randn(0, 6, dtype=dtype, grad=True), randn(13, 6, dtype=dtype, grad=True)
    loss = ops.linear_cross_entropy(hidden, weight, torch.empty(0, dtype=torch.int64), torch.empty(0))
    assert loss.dtype == ops.at_least_fp32(dtype)
    assert loss.item() == 0.0
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.shape == (0, 6)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_the_loss_of_bf16_logits_is_summed_in_fp32() -> None:
    hidden, weight, targets, weights = cross_entropy_inputs(7)
    loss = ops.linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets, weights.float())
    assert loss.dtype == torch.float32
