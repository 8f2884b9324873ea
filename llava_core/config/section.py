"""What every section of a config is made of: its base class, and numbers within limits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

NOT_GIVEN = "not_given"
"""The type of an error that a value not given yet makes, where pydantic's own `missing` cannot tell."""


def _number(value: object) -> object:
    if isinstance(value, bool):  # Python counts True as 1
        raise PydanticCustomError("bool_for_number", "expected a number")
    return value


Number = BeforeValidator(_number)
NonNegativeInt = Annotated[int, Number, Field(ge=0)]
PositiveInt = Annotated[int, Number, Field(gt=0)]
NonNegativeFloat = Annotated[float, Number, Field(ge=0.0)]
PositiveFloat = Annotated[float, Number, Field(gt=0.0)]
Fraction = Annotated[float, Number, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Number, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """A group of settings. In every path a leading `~` is the home folder."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, validate_default=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _expand_home(cls, value: Any) -> Any:
        if not isinstance(value, Path):
            return value
        try:
            return value.expanduser()
        except RuntimeError as error:
            raise ValueError(
                f"{str(value)!r} names no user's home folder ({error}); write ./~… for such a name"
            ) from error
