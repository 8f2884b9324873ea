"""Which part of a model is built where a pipeline spreads its layers over processes."""

from __future__ import annotations

from dataclasses import dataclass

from llava_core.model.spec import TextSpec


@dataclass(frozen=True)
class Stage:
    """A run of the decoder's layers. The first one has what comes before them, too: vision tower, projector and
    embedding; the last one the final norm and the head.

    Attributes:
        layers: their numbers.
        num_layers: of the whole decoder.
    """

    layers: range
    num_layers: int

    @classmethod
    def whole(cls, spec: TextSpec) -> Stage:
        """Of a model that is not divided."""
        return cls(range(spec.num_layers), spec.num_layers)

    @property
    def is_first(self) -> bool:
        """Whether it takes a batch's tokens and pixels."""
        return self.layers.start == 0

    @property
    def is_last(self) -> bool:
        """Whether it gives the loss."""
        return self.layers.stop == self.num_layers
