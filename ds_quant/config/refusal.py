"""A setting of DeepSpeed's JSON that some parts of the section refuse, and tests of values that rows share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def is_on(value: Any) -> bool:
    return bool(value) and value != "auto"  # DeepSpeed takes its default, off, for "auto"


def is_enabled(value: Any) -> bool:
    return isinstance(value, dict) and is_on(value.get("enabled"))


def is_given(value: Any) -> bool:
    return value is not None and value is not False


def is_nvme(value: Any) -> bool:
    return isinstance(value, str) and value.lower() == "nvme"


def is_above_one(value: Any) -> bool:
    return isinstance(value, int | float) and value > 1


def is_no_partition(value: Any) -> bool:
    return value in (None, 0)


def is_off(value: Any) -> bool:
    return value not in (True, "auto")


def is_elsewhere(value: Any) -> bool:
    return value not in (None, "none")


def is_not_bf16(value: Any) -> bool:
    return value not in (None, "bf16", "bfloat16")


def is_no_stage(value: Any) -> bool:
    return value is not None and not (type(value) is int and 0 <= value <= 3)


def is_three(value: Any) -> bool:
    return type(value) is int and value == 3


def is_not_two(value: Any) -> bool:
    return not (type(value) is int and value == 2)


def is_not_zero(value: Any) -> bool:
    return not (isinstance(value, int | float) and value == 0)


def is_not_false(value: Any) -> bool:
    return value is not False


def is_false(value: Any) -> bool:
    return value is False


def is_muon(value: Any) -> bool:
    return isinstance(value, str) and value.lower() == "muon"


@dataclass(frozen=True)
class Refusal:
    """A setting that some parts of the section refuse."""

    path: str
    """Dotted path in the DeepSpeed JSON."""
    refused: Callable[[Any], bool]
    """Whether its value is refused; None stands for absent."""
    parts: tuple[str, ...]
    """The parts of the section it collides with, as dotted paths inside `ds_quant`."""
    allowed: str
    reason: str
    fix: str = "remove it, or that part of the section"
    alias: str = ""
    """Another path, which DeepSpeed reads where there is nothing at the first."""
