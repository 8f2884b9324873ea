"""The Llama-family decoder. Parameter names are Hugging Face's.

Shapes: B rows (1 for packed samples), T tokens, D width, N query heads, G key/value heads, H head dim,
K selected positions.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from llava_core.backend import MaskSpec, OpSet
from llava_core.model.layers import Linear, RmsNorm
from llava_core.model.spec import TextSpec, inverse_frequencies
from llava_core.model.stage import Stage


class KeyValueCache(Protocol):
    """Where attention leaves its keys and values, and finds the earlier ones."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new k and v [B, T, G, H] of a layer and return what its queries attend to."""


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions. [B, T, D] -> [B, T, N·H], before the output projection."""

    def __init__(self, spec: TextSpec, layer: int, ops: OpSet) -> None:
        super().__init__()
        self.q_proj = Linear(spec.hidden_size, spec.num_heads * spec.head_dim, bias=False)
        self.k_proj = Linear(spec.hidden_size, spec.num_kv_heads * spec.head_dim, bias=False)
        self.v_proj = Linear(spec.hidden_size, spec.num_kv_heads * spec.head_dim, bias=False)
        self.o_proj = Linear(spec.num_heads * spec.head_dim, spec.hidden_size, bias=False)
        self.head_dim = spec.head_dim
        self.layer = layer
        self.ops = ops

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], mask: MaskSpec, cache: KeyValueCache | None) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.ops.rotary(q, k, *angles)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        return self.ops.attention(q, k, v, mask, self.head_dim**-0.5).flatten(2)


class Mlp(nn.Module):
    """SwiGLU feed-forward. Source: arXiv:2002.05202."""

    def __init__(self, spec: TextSpec, ops: OpSet) -> None:
        super().__init__()
        self.gate_proj = Linear(spec.hidden_size, spec.intermediate_size, bias=False)
        self.up_proj = Linear(spec.hidden_size, spec.intermediate_size, bias=False)
        self.down_proj = Linear(spec.intermediate_size, spec.hidden_size, bias=False)
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.ops.swiglu(self.gate_proj(x), self.up_proj(x)))


class DecoderLayer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, spec: TextSpec, layer: int, ops: OpSet) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(spec.hidden_size, spec.norm_eps, ops)
        self.self_attn = Attention(spec, layer, ops)
        self.post_attention_layernorm = RmsNorm(spec.hidden_size, spec.norm_eps, ops)
        self.mlp = Mlp(spec, ops)

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: MaskSpec,
        cache: KeyValueCache | None = None,
        select: Tensor | None = None,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D], or [B, K, D] at the positions `select` [K] of every row."""
        attended = self.self_attn(self.input_layernorm(x), angles, mask, cache)
        if select is not None:
            x, attended = x.index_select(1, select), attended.index_select(1, select)
        x = x + self.self_attn.o_proj(attended)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and final norm, or what a stage has of them.

    Attributes:
        layers: by their numbers in the whole decoder.
    """

    def __init__(self, spec: TextSpec, ops: OpSet, stage: Stage) -> None:
        super().__init__()
        self.spec = spec
        self.stage = stage
        if stage.is_first:
            self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleDict({str(i): DecoderLayer(spec, i, ops) for i in stage.layers})
        if stage.is_last:
            self.norm = RmsNorm(spec.hidden_size, spec.norm_eps, ops)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        mask: MaskSpec,
        cache: KeyValueCache | None = None,
        select: Tensor | None = None,
    ) -> Tensor:
        """Embeddings [B, T, D] at `positions` [B, T] -> normed hidden states [B, T, D].

        `select` [K] keeps only these positions, [B, K, D]: the last layer's feed-forward runs for no other. A stage
        that is not the first takes, and one that is not the last gives, the stream between the layers.
        """
        angles = rotary_angles(self.spec, positions, x.dtype)
        last = str(self.spec.num_layers - 1)
        for name, layer in self.layers.items():
            x = layer(x, angles, mask, cache, select if name == last else None)
        return self.norm(x) if self.stage.is_last else x


class LanguageModel(nn.Module):
    """The decoder and its output head, which is the embedding where they are tied."""

    def __init__(self, spec: TextSpec, ops: OpSet, stage: Stage) -> None:
        super().__init__()
        self.model = Decoder(spec, ops, stage)
        if stage.is_last and not spec.tied_embeddings:
            self.lm_head = Linear(spec.hidden_size, spec.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """The output matrix [V, D]."""
        tied = self.model.spec.tied_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight


def rotary_angles(spec: TextSpec, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [B, T, H] for positions [B, T]: computed in fp32, then cast, as Hugging Face does."""
    # From the host, so that every kind of hardware rotates by the same angles.
    frequencies = torch.tensor(inverse_frequencies(spec.rope, spec.head_dim), dtype=torch.float32)
    angles = positions[..., None].float() * frequencies.to(positions.device)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)
