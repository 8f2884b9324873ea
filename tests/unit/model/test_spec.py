"""Specs: sizes that follow from others, and combinations that are refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from llava_core.backend import OpSet
from llava_core.errors import ConfigError
from llava_core.model.freeze import part_of, train_only
from llava_core.model.layers import LayerNorm, Linear, RmsNorm, activation
from llava_core.model.llava import Llava
from llava_core.model.projector import Projector
from llava_core.model.spec import ModelSpec, RopeSpec, TextSpec, VisionSpec, inverse_frequencies, projector_depth

VISION = VisionSpec("clip", 24, 8, 32, 48, num_layers=4, num_heads=2, activation="quick_gelu", norm_eps=1e-5)
TEXT = TextSpec(
    "llama", 96, 64, 80, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, norm_eps=1e-5, max_positions=256
)


@pytest.mark.parametrize(
    ("image_size", "patch_size", "select", "tokens"),
    [(336, 14, "default", 576), (336, 14, "full", 577), (224, 14, "default", 256)],
)
def test_visual_tokens(image_size, patch_size, select, tokens):
    spec = replace(VISION, image_size=image_size, patch_size=patch_size, feature_select=select)
    assert spec.visual_tokens == tokens


def test_siglip_tokens_are_its_patches():
    assert replace(VISION, family="siglip", image_size=384, patch_size=14, feature_select="full").visual_tokens == 729


def test_siglip_has_no_class_token_to_drop():
    with pytest.raises(ConfigError, match="vision_feature_select = default drops the class token, and SigLIP has none"):
        replace(VISION, family="siglip", feature_select="default")


@pytest.mark.parametrize("layer", [-6, 5])
def test_feature_layer_outside_the_tower(layer):
    with pytest.raises(
        ConfigError, match=f"vision_feature_layer = {layer}: the tower has 4 layers; choose from -5 to 4"
    ):
        replace(VISION, feature_layer=layer)


@pytest.mark.parametrize(("layer", "run"), [(-1, 4), (-2, 3), (-5, 0), (0, 0), (4, 4)])
def test_layers_run(layer, run):
    assert replace(VISION, feature_layer=layer).num_layers_run == run


def test_vision_heads_divide_the_width():
    with pytest.raises(ConfigError, match="hidden_size 32 is not divisible by 5 heads"):
        replace(VISION, num_heads=5)


def test_kv_heads_divide_the_heads():
    with pytest.raises(ConfigError, match="4 heads are not divisible by 3 kv heads"):
        replace(TEXT, num_kv_heads=3)


@pytest.mark.parametrize(("kind", "depth"), [("linear", 1), ("identity", 0), ("mlp2x_gelu", 2), ("mlp9x_gelu", 9)])
def test_projector_depth(kind, depth):
    assert projector_depth(kind) == depth


@pytest.mark.parametrize("kind", ["mlp1x_gelu", "mlp10x_gelu", "mlp2x_relu", "resampler", ""])
def test_unknown_projector(kind):
    with pytest.raises(ConfigError, match="expected linear, identity or mlpNx_gelu"):
        ModelSpec(TEXT, VISION, projector=kind)


def test_identity_projector_needs_equal_widths():
    with pytest.raises(ConfigError, match="vision has 32, language 64"):
        ModelSpec(TEXT, VISION, projector="identity")


def test_identity_projector_hands_the_features_through():
    spec = ModelSpec(replace(TEXT, hidden_size=32), VISION, projector="identity")
    features = torch.randn(2, 9, 32)
    assert torch.equal(Projector(spec)(features), features)


def test_three_layer_projector():
    """Against the same layers written out."""
    projector = Projector(ModelSpec(TEXT, VISION, projector="mlp3x_gelu"))
    x = torch.randn(2, 9, 32)
    gelu = torch.nn.functional.gelu
    by_hand = projector.linear_3(gelu(projector.linear_2(gelu(projector.linear_1(x)))))
    assert torch.equal(projector(x), by_hand)


def test_plain_frequencies():
    assert inverse_frequencies(RopeSpec(theta=100.0), 4) == pytest.approx([1.0, 0.1])


def test_linear_scaling_divides_every_frequency():
    assert inverse_frequencies(RopeSpec(theta=100.0, kind="linear", factor=4.0), 4) == pytest.approx([0.25, 0.025])


def test_llama3_scaling_keeps_fast_divides_slow_and_blends_between():
    """By hand: 8, 0.8 and 2 turns in the original length, low factor 1, high factor 4."""
    length = 16 * math.pi  # one radian a position makes 8 turns
    rope = RopeSpec(100.0, "llama3", factor=2.0, original_max_positions=length)
    fast, slow = inverse_frequencies(rope, 4)
    assert (fast, slow) == pytest.approx((1.0, 0.05))
    rope = RopeSpec(16.0, "llama3", factor=2.0, original_max_positions=length)
    blend = (2 - 1) / (4 - 1)
    assert inverse_frequencies(rope, 4)[1] == pytest.approx(0.25 * (blend + (1 - blend) / 2))


@pytest.mark.parametrize("name", ["quick_gelu", "gelu", "gelu_pytorch_tanh"])
def test_activations_equal_transformers(name):
    from transformers.activations import ACT2FN

    x = torch.linspace(-6, 6, 101)
    torch.testing.assert_close(activation(name)(x), ACT2FN[name](x), rtol=0, atol=1e-6)


def test_unknown_activation():
    with pytest.raises(ConfigError, match="activation 'relu' is not known; there are: quick_gelu, gelu"):
        activation("relu")


@pytest.mark.parametrize(
    "module", [Linear(8, 8), Linear(8, 8, bias=False), LayerNorm(8), RmsNorm(8, 1e-5, OpSet.of({}))]
)
def test_layers_compute_in_the_dtype_of_their_input(module):
    assert module(torch.randn(3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_part_of_every_parameter():
    with torch.device("meta"):
        model = Llava(ModelSpec(TEXT, VISION), OpSet.of({}), torch.float32)
    assert {part_of(name) for name, _ in model.named_parameters()} == {"vision", "projector", "language"}


def test_train_only_freezes_the_rest():
    with torch.device("meta"):
        model = Llava(ModelSpec(TEXT, VISION), OpSet.of({}), torch.float32)
    train_only(model, {"projector", "vision"})
    assert {part_of(name) for name, p in model.named_parameters() if p.requires_grad} == {"projector", "vision"}
    train_only(model, {"language"})
    assert {part_of(name) for name, p in model.named_parameters() if p.requires_grad} == {"language"}
