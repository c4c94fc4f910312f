"""The base of the JSON's objects: strict, frozen, and with errors that name every wrong place and its fix."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, ClassVar, Literal, Self, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from ds_quant.base.errors import ConfigError, closest, problem
from ds_quant.config.deepspeed_json import SECTION


@dataclass(frozen=True)
class Allowed:
    """What the error message says about a field whose type alone does not tell."""

    text: str


@dataclass(frozen=True)
class OneOf:
    """One of values that may become more while the program runs (see `register_map`)."""

    values: Callable[[], Sequence[Any]]
    describe: Callable[[Sequence[Any]], str]

    @property
    def text(self) -> str:
        """What the error message says is allowed."""
        return self.describe(self.values())

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "enum": list(self.values())}

    def _check(self, value: Any) -> Any:
        if value not in self.values():
            raise PydanticCustomError("one_of", "another value is wanted")
        return value


class _Nothing:
    def __repr__(self) -> str:
        return "nothing"


NOTHING = _Nothing()
"""What a rule got where a key is missing."""

Rule = tuple[str, Any, str, str]
"""A broken rule: the key (empty for the whole object), what was got (a section as it was written), what is allowed, the
fix."""


class Section(BaseModel):
    """An object of the JSON. Frozen, exact types, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)
    where: ClassVar[str] = SECTION
    left_out: ClassVar[dict[str, tuple[str, str]]] = {}
    """Keys of other objects that someone may look for here: what is allowed in their place, and the fix."""

    @classmethod
    def parse(cls, value: Any) -> Self:
        """`value`, a JSON object or an instance, validated; `ConfigError` with every problem."""
        lines = _autos(value, cls.where)
        try:
            parsed = cls.model_validate(value)
        except ValidationError as error:
            lines = _problems(error, cls) | lines
        if lines:
            raise ConfigError("\n".join(lines.values()))
        return parsed

    def rules(self) -> Iterator[Rule]:
        """The rules between fields that this object breaks."""
        yield from ()

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        if broken := [(key, _as_written(got), *rest) for key, got, *rest in self.rules()]:
            text = "; ".join(problem(*rule) for rule in broken)
            raise PydanticCustomError("rules", "{text}", {"text": text, "broken": broken})
        return self


def _as_written(got: Any) -> Any:
    return got.model_dump(exclude_unset=True) if isinstance(got, Section) else got


def _section_of(owner: type[Section], field: str) -> type[Section] | None:
    """The class of the object under this key, if it is one."""
    info = owner.model_fields.get(field)
    kinds = get_args(info.annotation) if info else ()
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def allowed_values(owner: type[Section], field: str | None) -> str:
    if field is None:
        return f"an object with the keys {', '.join(owner.model_fields)}"
    if section := _section_of(owner, field):
        return f"{allowed_values(section, None)}; or null"
    info = owner.model_fields[field]
    kind, metadata = info.annotation, info.metadata
    if NoneType in get_args(kind):
        kind = get_args(kind)[0]
        metadata = getattr(kind, "__metadata__", metadata)
    for item in metadata:
        if isinstance(item, Allowed | OneOf):
            return item.text
    if get_origin(kind) is Literal:
        return ", ".join(f'"{value}"' for value in get_args(kind))
    return "true or false"


def _problems(error: ValidationError, model: type[Section]) -> dict[str, str]:
    """A line for each place that is wrong (pydantic reports each branch of a union)."""
    lines: dict[str, str] = {}
    for details in error.errors(include_url=False):
        where, owner = model.where, model
        field: str | None = None
        section: type[Section] | None = model
        for part in details["loc"]:
            if isinstance(part, int):
                where = f"{where}[{part}]"
            elif section is not None:  # else it names the branch of a union
                where, owner, field, section = f"{where}.{part}", section, part, _section_of(section, part)
        kind, got = details["type"], details["input"]
        if kind == "rules":
            for key, *rest in details["ctx"]["broken"]:
                place = f"{where}.{key}" if key else where
                lines[f"{place} {rest}"] = problem(place, *rest)
        elif kind == "extra_forbidden":
            match = closest(field, owner.model_fields)
            fix = f'did you mean "{match}"?' if match else "remove it"
            keys = f"the keys {', '.join(owner.model_fields)}"
            lines[where] = problem(where, got, *owner.left_out.get(field or "", (keys, fix)))
        elif kind == "missing":
            lines[where] = f"{where}: got nothing; allowed: {allowed_values(owner, field)}; fix: add it"
        elif kind != "default_factory_not_called":  # the field it depends on is reported already
            allowed = allowed_values(owner, field)
            match = closest(got, re.findall(r'"(\w+)"', allowed))
            fix = f'did you mean "{match}"?' if match and match != got else "write what is allowed"
            lines.setdefault(where, problem(where, got, allowed, fix))
    return lines


def _autos(node: Any, where: str) -> dict[str, str]:
    if isinstance(node, str) and node == "auto":
        return {where: problem(where, node, "a value", 'write it out: "auto" has no meaning inside this section')}
    items: list[tuple[str, Any]] = []
    if isinstance(node, dict):
        items = [(f"{where}.{key}", value) for key, value in node.items()]
    elif isinstance(node, list | tuple):
        items = [(f"{where}[{index}]", value) for index, value in enumerate(node)]
    return {place: line for start, value in items for place, line in _autos(value, start).items()}


class BlockSection(Section):
    """An object whose `block_size` may count for nothing: by default, unless granularity is `block`."""

    null_is_absent: ClassVar[tuple[str, ...]] = ()
    """Keys that a dump leaves out where they are None."""

    def rules(self) -> Iterator[Rule]:
        if self._block_size_is_idle() and "block_size" in self.model_fields_set:
            fix = 'remove it, or set granularity to "block"'
            yield "block_size", getattr(self, "block_size", None), 'only with granularity "block"', fix

    def _block_size_is_idle(self) -> bool:
        return getattr(self, "granularity", None) != "block"

    @model_serializer(mode="wrap")
    def _without_absent(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A dump that can be loaded."""
        absent = [name for name in self.null_is_absent if getattr(self, name) is None]
        if self._block_size_is_idle():
            absent.append("block_size")
        return {key: value for key, value in serialize(self).items() if key not in absent}


def bits_or_format(section: Any, allowed_bits: str) -> Iterator[Rule]:
    """The rule of objects that take one of `bits` and `format`."""
    if section.bits is None and section.format is None:
        yield "bits", NOTHING, f'{allowed_bits}, or "format" in its place', "add it"
    elif section.bits is not None and section.format is not None:
        yield "format", section.format, 'absent beside "bits", which says another one', "remove one of the two"
