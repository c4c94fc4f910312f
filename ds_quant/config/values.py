"""Types of values that several objects of the section share, and what their error messages say is allowed."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from ds_quant.base.number_formats import FORMATS, WIRE_FORMATS
from ds_quant.config.section import Allowed, OneOf, Rule, Section


def exact_int(value: Any) -> Any:
    # A Literal of integers would take 8.0, and a union with False would take 0.
    if type(value) is not int:
        raise PydanticCustomError("exact_int", "an integer is wanted")
    return value


def not_null(value: Any) -> Any:
    """Of a key that may be absent, but not null."""
    if value is None:
        raise PydanticCustomError("not_null", "a value is wanted")
    return value


def _node_size(value: Any) -> Any:
    if not isinstance(value, bool) and exact_int(value) < 2:
        raise PydanticCustomError("node_size", "two ranks or more are wanted")
    return value


def _power_of_two(value: int) -> int:
    if value & (value - 1):
        raise PydanticCustomError("power_of_two", "a power of two is wanted")
    return value


def _pattern(value: str) -> str:
    if not value.strip():
        raise PydanticCustomError("empty_pattern", "an empty pattern matches nothing")
    return value


def _class_name(value: str) -> str:
    if not all(part.isidentifier() or part == "<locals>" for part in value.split(".")):
        raise PydanticCustomError("class_name", "a class name or its dotted path is wanted")
    return value


Bits = Annotated[int, Field(ge=2, le=8), Allowed("an integer from 2 to 8")]
FormatName = Annotated[str, OneOf(lambda: tuple(FORMATS), lambda names: ", ".join(f'"{name}"' for name in names))]
WireFormatName = Annotated[
    Literal["fp4_e2m1", "mxfp4", "nvfp4", "nvint4"],
    Allowed(
        ", ".join(f'"{name}"' for name in WIRE_FORMATS)
        + ": those of 8 bits lose more of a gradient than 8-bit integers, and messages have no codes of 6 bits"
    ),
]
WireBits = Annotated[Literal[4, 8], BeforeValidator(exact_int), Allowed("4 or 8")]
LinearBlock = Annotated[
    int, Field(ge=16, le=4096), AfterValidator(_power_of_two), Allowed("a power of two from 16 to 4096")
]
FlatBlock = Annotated[
    int, Field(ge=32, le=4096), AfterValidator(_power_of_two), Allowed("a power of two from 32 to 4096")
]
RanksPerNode = Annotated[
    bool | Annotated[int, Field(ge=2)],  # ge for the JSON schema
    BeforeValidator(_node_size),
    Allowed("false, true for the ranks that the launcher has put on a node, or their number, 2 or more"),
]
Rounding = Literal["nearest", "stochastic"]
GradientRounding = Literal["nearest", "stochastic", "ms_eden"]
# JSON arrays come as lists, which strict mode would refuse for a tuple.
Patterns = Annotated[
    tuple[Annotated[str, AfterValidator(_pattern)], ...],
    Field(strict=False),
    Allowed("a list of shell patterns, none of them empty"),
]
ClassNames = Annotated[
    tuple[Annotated[str, AfterValidator(_class_name)], ...],
    Field(strict=False),
    Allowed("a list of class names or dotted paths of classes, no patterns"),
]


def flat_block_size(data: dict[str, Any]) -> int:
    return 256 if data["bits"] == 8 else 128


def nothing(section: Section, keys: str) -> Rule:
    return "", section, f"at least one of {keys}", "it quantizes nothing: say what"
