"""A tiny Llama of transformers gives the host's losses and gradients."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

# Seen: 2.4e-7. Losses are around 4.6, where one unit in the last place of fp32 is 4.8e-7.
LOSS_TOLERANCE = 5e-7
# Relative to each gradient's largest value.
GRADIENT_TOLERANCE = 2e-6


def build_llama(attention: str) -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def test_transformers_sees_an_npu() -> None:
    assert transformers.utils.is_torch_npu_available()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_llama_equals_the_hosts(attention: str) -> None:
    tokens = torch.randint(0, 97, (2, 24))
    host, device = build_llama(attention), build_llama(attention).npu()
    expected, actual = host(tokens, labels=tokens).loss, device(tokens.npu(), labels=tokens.npu()).loss
    expected.backward()
    actual.backward()
    assert abs(actual.item() - expected.item()) <= LOSS_TOLERANCE
    for (name, ours), theirs in zip(device.named_parameters(), host.parameters(), strict=True):
        error = (ours.grad.cpu() - theirs.grad).abs().max() / theirs.grad.abs().max()
        assert error <= GRADIENT_TOLERANCE, name
