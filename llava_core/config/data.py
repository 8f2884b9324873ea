"""What a run trains and validates on: data sets by their paths, and how a row becomes tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from llava_core.config.section import (
    NOT_GIVEN,
    Fraction,
    NonNegativeInt,
    Number,
    PositiveFloat,
    PositiveInt,
    Section,
)


class SourceConfig(Section):
    """One data set of several. What is not given here is as in `data`."""

    path: Path = Field(description="a data file")
    images: Path | None = Field(None, description="the folder that image paths are relative to")
    reader: str | None = Field(None, description="a registered reader; by the file's suffix if not given")
    template: str | None = Field(None, description="a conversation template")
    weight: PositiveFloat | None = Field(None, description="its share of each epoch; in every source, or in none")
    split: str | None = Field(None, description="which part of the data set, for a reader that knows parts")


class DataConfig(Section):
    """What is trained on, and how a row becomes tokens: `path` alone, or several `sources`."""

    path: Path | None = Field(None, description="a data file, e.g. LLaVA JSON or JSONL")
    images: Path | None = Field(None, description="the folder that image paths are relative to")
    reader: str | None = Field(None, description="a registered reader; by the file's suffix if not given")
    template: str | None = Field(
        None,
        description="a registered conversation template, a YAML file of one, or `tokenizer` for the tokenizer's own; "
        "v1 if not given, and text where there are no conversations",
    )
    split: str | None = Field(None, description="which part of the data set, for a reader that knows parts")
    sources: tuple[SourceConfig, ...] = Field((), description="several data sets in place of path")
    image_aspect: Literal["square", "pad", "tiles", "anyres"] = Field(
        "pad",
        description="crop to a square, pad to one, or divide: into tiles, or at a LLaVA-NeXT's image_grid_pinpoints",
    )
    min_tiles: PositiveInt | None = Field(None, description="with image_aspect tiles: at least so many; 1 if not given")
    max_tiles: PositiveInt | None = Field(
        None,
        description="with image_aspect tiles: at most so many, and the whole image as one more",
    )
    max_length: PositiveInt = Field(2048, description="tokens of a sample, its visual tokens included")
    overlong: Literal["truncate", "drop", "split"] | None = Field(
        None,
        description="what becomes of a longer one; if not given, conversations are truncated and documents split",
    )
    order: Literal["shuffled", "sequential", "modality_length", "length_grouped"] = Field(
        "shuffled",
        description="modality_length: the original LLaVA's grouping by modality and length; length_grouped: XTuner's, "
        "over groups of several steps",
    )
    mega_batch_mult: PositiveInt | None = Field(
        None,
        description="with order length_grouped: steps of a group; null: 50, or fewer so that an epoch has four groups",
    )
    num_workers: NonNegativeInt = Field(0, description="processes that decode; 0 decodes in the trainer")
    max_bad_fraction: Fraction = Field(0.01, description="the run stops when more rows than this are unusable")
    max_image_pixels: PositiveInt = Field(100_000_000, description="larger images are refused before decoding")

    @model_validator(mode="after")
    def _tiles_have_limits(self) -> DataConfig:
        if self.image_aspect != "tiles":
            if self.min_tiles is not None or self.max_tiles is not None:
                raise ValueError("min_tiles and max_tiles limit image_aspect tiles: leave them out, or set it")
        elif self.max_tiles is None:
            raise PydanticCustomError(NOT_GIVEN, "set max_tiles, the limit of image_aspect tiles")
        elif (self.min_tiles or 1) > self.max_tiles:
            raise ValueError(f"min_tiles {self.min_tiles} is above max_tiles {self.max_tiles}")
        return self

    @model_validator(mode="after")
    def _one_form(self) -> DataConfig:
        if not self.sources:
            if self.path is None:
                raise PydanticCustomError(NOT_GIVEN, "set path (one data set), or sources (several)")
            return self
        clashing = [key for key in ("path", "split") if getattr(self, key) is not None]
        if clashing:
            raise ValueError(f"sources has several data sets, so {', '.join(clashing)} cannot be set beside it")
        weighted = [number for number, source in enumerate(self.sources) if source.weight is not None]
        if weighted and len(weighted) < len(self.sources):
            raise ValueError(f"sources {weighted} have a weight and others have none: give each one, or none")
        return self

    @model_validator(mode="after")
    def _groups_of_length_grouped(self) -> DataConfig:
        if self.mega_batch_mult is not None and self.order != "length_grouped":
            raise ValueError(f"mega_batch_mult means nothing under order {self.order}: leave it out")
        return self

    @property
    def inputs(self) -> tuple[SourceConfig, ...]:
        """The data sets, in the one form that both ways to give them become; `template` is left to whoever reads."""
        if self.path is not None:
            return (SourceConfig(path=self.path, images=self.images, reader=self.reader, split=self.split),)
        return tuple(
            source.model_copy(update={"images": source.images or self.images, "reader": source.reader or self.reader})
            for source in self.sources
        )


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
