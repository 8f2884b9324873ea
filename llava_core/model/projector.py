"""The projector: visual features to the language model's width.

Shapes: F features, Dv and D the widths of the tower and the language model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llava_core.model.layers import Linear
from llava_core.model.spec import ModelSpec, projector_depth


class Projector(nn.Module):
    """`linear`, `identity`, or `mlpNx_gelu`: N linear layers with exact GELU between them. [..., Dv] -> [..., D].

    Layers are named `linear_1` … `linear_N`, Hugging Face's names for N = 2. LLaVA-NeXT's has the newline, too, which
    ends each row of an image's features.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        assert spec.vision is not None
        self.depth = projector_depth(spec.projector)
        for i in range(1, self.depth + 1):
            width = spec.vision.hidden_size if i == 1 else spec.text.hidden_size
            self.add_module(f"linear_{i}", Linear(width, spec.text.hidden_size))
        if spec.image_grid_pinpoints:
            width = spec.text.hidden_size
            self.image_newline = nn.Parameter(torch.randn(width) * width**-0.5)  # the original's initialisation

    def forward(self, features: Tensor, num_newlines: int = 0) -> Tensor:
        """The features; of LLaVA-NeXT's [F, Dv], and so many newlines after them, [F + num_newlines, D]."""
        for i in range(1, self.depth + 1):
            if i > 1:
                features = nn.functional.gelu(features)
            features = self.get_submodule(f"linear_{i}")(features)
        if hasattr(self, "image_newline"):
            newline = self.image_newline.to(features.dtype)
            features = torch.cat((features, newline.expand(num_newlines, -1)))
        return features
