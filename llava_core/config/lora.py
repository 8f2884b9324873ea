"""The settings of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from llava_core.config.section import Number, PositiveInt, Section


class LowRankConfig(Section):
    """The adapters of one part of the model."""

    rank: PositiveInt = Field(description="of the two matrices that learn beside each target")
    alpha: PositiveInt = Field(description="their product is added times alpha / rank")


class LanguageLora(LowRankConfig):
    """Beside layers of the language model."""

    targets: tuple[Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        description="which linear layers, in every decoder layer",
    )


class VisionLora(LowRankConfig):
    """Beside layers of the vision tower."""

    targets: tuple[Literal["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"], ...] = Field(
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        description="which linear layers, in every tower layer that the chosen features depend on",
    )


class LoraConfig(Section):
    """Low-rank adapters, of one part or of both; a part with adapters keeps its own weights frozen."""

    language: LanguageLora | None = None
    vision: VisionLora | None = None
    dropout: Annotated[float, Number, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="of what goes into an adapter, in training"
    )
    dora: bool = Field(False, description="learn the size of each row of a weight apart from its direction (DoRA)")
    path: Path | None = Field(None, description="a folder with an adapter to go on from, of the same settings")

    @model_validator(mode="after")
    def _has_a_part(self) -> LoraConfig:
        if not self.parts:
            raise ValueError("set language or vision, or both: without one nothing gets an adapter")
        for part, given in self.parts.items():
            if not given.targets or len(set(given.targets)) != len(given.targets):
                raise ValueError(f"{part}.targets = {list(given.targets)}: name at least one layer, each once")
        return self

    @property
    def parts(self) -> dict[str, LanguageLora | VisionLora]:
        """The parts that have adapters."""
        given = {"language": self.language, "vision": self.vision}
        return {part: settings for part, settings in given.items() if settings is not None}
