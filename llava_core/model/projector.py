"""The projector: visual features to the language model's width."""

from __future__ import annotations

from torch import Tensor, nn

from llava_core.model.layers import Linear
from llava_core.model.spec import ModelSpec, projector_depth


class Projector(nn.Module):
    """`linear`, `identity`, or `mlpNx_gelu`: N linear layers with exact GELU between them. [I, V, Dv] -> [I, V, D].

    Layers are named `linear_1` … `linear_N`, Hugging Face's names for N = 2.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        assert spec.vision is not None
        self.depth = projector_depth(spec.projector)
        for i in range(1, self.depth + 1):
            width = spec.vision.hidden_size if i == 1 else spec.text.hidden_size
            self.add_module(f"linear_{i}", Linear(width, spec.text.hidden_size))

    def forward(self, features: Tensor) -> Tensor:
        for i in range(1, self.depth + 1):
            if i > 1:
                features = nn.functional.gelu(features)
            features = self.get_submodule(f"linear_{i}")(features)
        return features
