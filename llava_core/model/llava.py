"""The whole model: a Batch in, a loss out.

Shapes: T tokens, I tiles, P features a tile, V visual tokens, D width, K supervised positions.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llava_core.backend import MaskSpec, OpSet
from llava_core.data.batch import Batch
from llava_core.model.decoder import KeyValueCache, LanguageModel
from llava_core.model.projector import Projector
from llava_core.model.spec import ModelSpec
from llava_core.model.stage import Stage
from llava_core.model.vision import VisionTower

if TYPE_CHECKING:
    from llava_core.model.adapters import Adapters


class Llava(nn.Module):
    """A LLaVA, or a language model alone where the spec has no vision; or a stage of one.

    Attributes:
        compute_dtype: dtype of the activations.
        stage: what it has of the whole model; everything, if not given.
        adapters: what learns in place of weights; None for weights alone.
    """

    adapters: Adapters | None = None

    def __init__(self, spec: ModelSpec, ops: OpSet, compute_dtype: torch.dtype, stage: Stage | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.ops = ops
        self.compute_dtype = compute_dtype
        self.stage = stage or Stage.whole(spec.text)
        if spec.vision is not None and self.stage.is_first:
            self.vision_tower = VisionTower(spec.vision, ops)
            self.multi_modal_projector = Projector(spec)
        self.language_model = LanguageModel(spec.text, ops, self.stage)

    def forward(self, batch: Batch, label_weights: Tensor, stream: Tensor | None = None) -> Tensor:
        """The weighted sum of the supervised tokens' cross-entropies, an fp32 scalar; of a stage that is not the last
        the stream after its layers [T, D].

        Args:
            batch: on the model's device.
            label_weights: [K] fp32; 1/K for the mean over this batch.
            stream: what the stage before gave, [T, D]; None for the first.
        """
        if not self.stage.is_last:
            return self.hidden_states(batch, stream=stream)
        hidden = self.hidden_states(batch, batch.label_index, stream=stream)
        head = self.language_model.head_weight.to(hidden.dtype)
        return self.ops.linear_cross_entropy(hidden, head, batch.targets, label_weights)

    def hidden_states(
        self,
        batch: Batch,
        select: Tensor | None = None,
        cache: KeyValueCache | None = None,
        stream: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states [T, D], or [K, D] at the positions `select`; of a stage, from `stream` as `forward`."""
        mask = MaskSpec.packed(
            batch.cu_seqlens, batch.cu_seqlens_host, causal=True, window=self.spec.text.sliding_window
        )
        x = self.embed_batch(batch) if stream is None else stream
        return self.language_model.model(x[None], batch.positions[None], mask, cache, select)[0]

    def embed_batch(self, batch: Batch) -> Tensor:
        """What enters the decoder [T, D]: the tokens' embeddings, the images' features in their places."""
        x = self.embed(batch.tokens)
        if self.spec.vision is None:
            return x
        return splice(x, self.encode_images(batch), batch.image_index)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [...] -> embeddings [..., D] in the compute dtype."""
        return self.language_model.model.embed_tokens(tokens).to(self.compute_dtype)

    def encode_images(self, batch: Batch) -> Tensor:
        """A batch's visual tokens [V, D], in the order of its `image_index`; features that are not used may follow. A
        frozen tower keeps no graph."""
        trained = any(p.requires_grad for p in self.vision_tower.parameters())
        with contextlib.nullcontext() if trained else torch.no_grad():
            features = self.vision_tower(batch.pixels.to(self.compute_dtype))
        if not self.spec.image_grid_pinpoints:
            return self.multi_modal_projector(features).flatten(0, 1)
        rows = features.flatten(0, 1)
        # Without images, none: yet the modules take part in the graph, as in every process.
        used = rows[:0] if batch.feature_index is None else rows.index_select(0, batch.feature_index)
        return self.multi_modal_projector(used, batch.num_newlines)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] -> logits [..., vocabulary], in the compute dtype."""
        return hidden @ self.language_model.head_weight.to(hidden.dtype).T


def splice(x: Tensor, features: Tensor, image_index: Tensor) -> Tensor:
    """Visual tokens [V or more, D] put at `image_index` [V] of the embeddings [T, D].

    A batch without images still brings one zero image; then the index is empty, and the features take part in the graph
    with none of their rows, so that every process runs the same modules.
    """
    return x.index_copy(0, image_index, features[: image_index.numel()])
