"""What values of a config may be, and how a wrong one is told: one line that names it."""

import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

config = dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))
Count = Annotated[int, Field(gt=0, le=2**53)]  # as far as JSON's numbers are exact
Whole = Annotated[int, Field(ge=0, le=2**53)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]
Epsilon = Annotated[float, Field(ge=1e-37, le=1)]  # not 0 in float32 either: the norm of a row of zeros would be 0 / 0
# About ten times the largest published models: no product of sizes overflows 64 bits, and models build in seconds.
Layers = Annotated[int, Field(gt=0, le=1000)]
FromTheEnd = Annotated[int, Field(ge=-1000, le=-1)]
Stack = Annotated[int, Field(gt=0, le=2**10)]
Kernel = Annotated[int, Field(gt=0, le=2**10 + 1)]
Width = Annotated[int, Field(gt=0, le=2**20)]
WidthOrDefault = Annotated[int, Field(ge=0, le=2**20)]
Heads = Annotated[int, Field(gt=0, le=2**14)]
Tokens = Annotated[int, Field(gt=0, le=2**31 - 1)]  # their offsets are int32
Pixels = Annotated[int, Field(gt=0, le=2**14)]
Norm = Literal["none", "layer", "rms", "rms_offset"]  # rms_offset multiplies by 1 + weight (Gemma)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def validated(cls: type, keys: Any, origin: Any) -> Any:
    """An instance of a config class from values of the JSON file ``origin``. ValueError with one line."""
    try:
        return TypeAdapter(cls).validate_json(json.dumps(keys))  # a dict would be refused a list for a tuple
    except ValidationError as error:
        raise ValueError(f"{origin}: {first_error(error)}") from None


def first_error(error: ValidationError, loc: tuple | None = None) -> str:
    """One line for the first error that pydantic found. ``loc`` replaces the key that pydantic gives."""
    first = error.errors()[0]
    where = shown(".".join(str(part) for part in loc or first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    given = "" if first["type"] in ("value_error", "missing") else f", got {shown(repr(first['input']))}"
    return f"{where}: {message}{given}" if where else f"{message}{given}"


def counted(number: int, noun: str) -> str:
    """1 image, 2 images."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def shown(value: Any, most: int = 200) -> str:
    """A user's input for an error message: one line of at most ``most`` printable characters."""
    text = value if isinstance(value, str) else repr(value)
    text = "".join(character if character.isprintable() else " " for character in text[: most + 1])
    return text if len(text) <= most else f"{text[:most]}..."
