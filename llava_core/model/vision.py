"""CLIP and SigLIP vision towers. Parameter names are Hugging Face's.

Shapes: I images, P positions inside the tower, D width, N heads, H head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llava_core.backend import MaskSpec, OpSet
from llava_core.model.layers import LayerNorm, Linear, activation
from llava_core.model.spec import VisionSpec


class VisionEmbeddings(nn.Module):
    """Pixels [I, 3, S, S] -> [I, P, D]: patches, CLIP's class token first, positions added."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(
            3, spec.hidden_size, spec.patch_size, stride=spec.patch_size, bias=spec.family == "siglip"
        )
        self.position_embedding = nn.Embedding(spec.num_positions, spec.hidden_size)
        if spec.family == "clip":
            self.class_embedding = nn.Parameter(torch.zeros(spec.hidden_size))

    def forward(self, pixels: Tensor) -> Tensor:
        conv = self.patch_embedding
        bias = None if conv.bias is None else conv.bias.to(pixels.dtype)
        patches = nn.functional.conv2d(pixels, conv.weight.to(pixels.dtype), bias, conv.stride)
        x = patches.flatten(2).transpose(1, 2)
        if hasattr(self, "class_embedding"):
            x = torch.cat((self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x), dim=1)
        return x + self.position_embedding.weight.to(x.dtype)


class VisionAttention(nn.Module):
    """Full self-attention. [I, P, D] -> [I, P, D]."""

    def __init__(self, spec: VisionSpec, ops: OpSet) -> None:
        super().__init__()
        width = spec.hidden_size
        self.q_proj, self.k_proj = Linear(width, width), Linear(width, width)
        self.v_proj, self.out_proj = Linear(width, width), Linear(width, width)
        self.head_dim = spec.head_dim
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        attended = self.ops.vision_attention(q, k, v, MaskSpec.dense(causal=False), self.head_dim**-0.5)
        return self.out_proj(attended.flatten(2))


class VisionMlp(nn.Module):
    """Two linear layers around the tower's activation."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.fc1 = Linear(spec.hidden_size, spec.intermediate_size)
        self.fc2 = Linear(spec.intermediate_size, spec.hidden_size)
        self.activation = activation(spec.activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class VisionLayer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, spec: VisionSpec, ops: OpSet) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(spec.hidden_size, eps=spec.norm_eps)
        self.self_attn = VisionAttention(spec, ops)
        self.layer_norm2 = LayerNorm(spec.hidden_size, eps=spec.norm_eps)
        self.mlp = VisionMlp(spec)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionEncoder(nn.Module):
    """The stack of layers; all are built, so that an export is complete, and only those needed are run."""

    def __init__(self, spec: VisionSpec, ops: OpSet) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(spec, ops) for _ in range(spec.num_layers))


class VisionTransformer(nn.Module):
    """Pixels [I, 3, S, S] -> features [I, V, D] of the layer and tokens that the spec selects."""

    def __init__(self, spec: VisionSpec, ops: OpSet) -> None:
        super().__init__()
        self.spec = spec
        self.embeddings = VisionEmbeddings(spec)
        if spec.family == "clip":
            self.pre_layrnorm = LayerNorm(spec.hidden_size, eps=spec.norm_eps)  # the name on disk is spelt so
        self.encoder = VisionEncoder(spec, ops)
        self.post_layernorm = LayerNorm(
            spec.hidden_size, eps=spec.norm_eps
        )  # exported, never run: features are earlier

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.embeddings(pixels)
        if self.spec.family == "clip":
            x = self.pre_layrnorm(x)
        for layer in self.encoder.layers[: self.spec.num_layers_run]:
            x = layer(x)
        return x[:, 1:] if self.spec.feature_select == "default" else x


class VisionTower(nn.Module):
    """Holds the transformer under the name that Hugging Face gives it."""

    def __init__(self, spec: VisionSpec, ops: OpSet) -> None:
        super().__init__()
        self.vision_model = VisionTransformer(spec, ops)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.vision_model(pixels)
