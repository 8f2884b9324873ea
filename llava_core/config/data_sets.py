"""Data sets by their paths: one of several to train on, and those to validate on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from llava_core.config.section import NOT_GIVEN, Number, PositiveFloat, PositiveInt, Section


class SourceConfig(Section):
    """One data set of several. What is not given here is as in `data`."""

    path: Path = Field(description="a data file")
    images: Path | None = Field(None, description="the folder that image paths are relative to")
    reader: str | None = Field(None, description="a registered reader; by the file's suffix if not given")
    template: str | None = Field(None, description="a conversation template")
    weight: PositiveFloat | None = Field(None, description="its share of each epoch; in every source, or in none")
    split: str | None = Field(None, description="which part of the data set, for a reader that knows parts")


class ValidationConfig(Section):
    """What the model is tried on while it trains: data sets of its own, or rows held out of `data`. What is not given
    here is as in `data`."""

    path: Path | None = Field(None, description="a data file")
    images: Path | None = Field(None, description="the folder that image paths are relative to")
    reader: str | None = Field(None, description="a registered reader")
    split: str | None = Field(None, description="which part of the data set, for a reader that knows parts")
    sources: tuple[SourceConfig, ...] = Field((), description="several data sets in place of path, without weights")
    fraction: Annotated[float, Number, Field(gt=0.0, lt=1.0)] | None = Field(
        None, description="in place of path: this share of each data set's rows, which are then not trained on"
    )
    every_steps: PositiveInt | None = Field(
        None, description="at these intervals, and at the end of the run; null: only at the end"
    )
    max_samples: PositiveInt | None = Field(
        None, description="at most so many rows each time, the same ones, spread evenly over the data; null: all"
    )

    @model_validator(mode="after")
    def _one_kind(self) -> ValidationConfig:
        given = [key for key in ("path", "sources", "fraction") if getattr(self, key)]
        if not given:
            raise PydanticCustomError(NOT_GIVEN, "set path (one data set), sources (several) or fraction (of data)")
        idle = {"path": (), "sources": ("split",), "fraction": ("images", "reader", "split")}[given[0]]
        clashing = [*given[1:], *(key for key in idle if getattr(self, key) is not None)]
        if clashing:
            raise ValueError(f"{given[0]} says what to validate on, so {', '.join(clashing)} cannot be set beside it")
        if any(source.weight is not None for source in self.sources):
            raise ValueError("every row of every source counts once: leave their weight out")
        return self
