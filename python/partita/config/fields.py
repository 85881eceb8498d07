"""The value types that config keys have in common, and the note of how a key relates to DeepSpeed's."""

from __future__ import annotations

import math
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic.fields import FieldInfo

_SHORT_NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_LONG_HALF_NAMES = {"fp16": "float16", "bf16": "bfloat16"}


class Section(BaseModel):
    """A JSON object of the config: immutable, no unknown keys, no conversion between types, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)


@dataclass(frozen=True)
class DeepSpeedDefault:
    """Marks a key that DeepSpeed has with another default. Its value is what the documentation prints."""

    text: str


@dataclass(frozen=True)
class OwnKey:
    """Marks a key that DeepSpeed does not have."""


@dataclass(frozen=True)
class RankLocal:
    """Marks a key that may differ between ranks. All others must be the same on all ranks."""


def takes_auto(field: FieldInfo) -> bool:
    """Whether "auto" is a value like others for this key."""
    return "auto" in (*typing.get_args(field.annotation), field.default)


def _renamed(names: dict[str, str]) -> Callable[[Any], Any]:
    return lambda value: names.get(value, value) if isinstance(value, str) else value


def _whole_number(value: Any) -> Any:
    # Bucket sizes are customarily written 5e8, which JSON parsers read as a float.
    return int(value) if isinstance(value, float) and math.isfinite(value) and value.is_integer() else value


def _plain_json(value: Any, path: str = "") -> Any:
    """A copy that holds JSON types only, so that a frozen config shares no state and survives being saved."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"key {key!r} in {path or 'the object'} is not a string")
        return {key: _plain_json(item, f"{path}.{key}" if path else key) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_json(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{path} = {value!r} is not a finite number")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"{path or 'it'} is of type {type(value).__name__}, which JSON does not have")


FloatName = Annotated[
    Literal["fp32", "fp16", "bf16"],
    BeforeValidator(_renamed(_SHORT_NAMES)),
    WithJsonSchema({"type": "string", "enum": ["fp32", "fp16", "bf16", *_SHORT_NAMES]}),
]
"""A floating-point type. Torch's spelling is accepted as well and becomes the short one."""

AutocastName = Annotated[
    Literal["bfloat16", "float16"],
    BeforeValidator(_renamed(_LONG_HALF_NAMES)),
    WithJsonSchema({"type": "string", "enum": ["bfloat16", "float16", "bf16", "fp16"]}),
]
"""A floating-point type for autocast, where torch's spelling is the canonical one."""

OffloadDevice = Literal["none", "cpu"]
MasterWeights = Literal["fp32", "split"]
TransportName = Literal["auto", "shared_memory", "torch"]
"""What carries the bytes between ranks."""

WHOLE = BeforeValidator(_whole_number)
"""For integers: 5e8 is as good as 500000000."""

PositiveInt = Annotated[int, Field(ge=1), WHOLE]
NaturalInt = Annotated[int, Field(ge=0), WHOLE]

Params = Annotated[dict[str, Any], BeforeValidator(_plain_json)]
"""Keyword arguments. Who builds the optimizer or the schedule checks them; here they only have to be JSON."""
