"""Errors for settings that cannot be followed: where, what was got, what is allowed, the fix."""

import difflib
import json
from collections.abc import Iterable
from typing import Any


class ConfigError(ValueError):
    """A setting that ds_quant cannot follow. One line a problem: where, what was got, what is allowed, the fix."""


def problem(where: str, got: Any, allowed: str, fix: str) -> str:
    """One line of a `ConfigError`."""
    try:
        shown = json.dumps(got)
    except (TypeError, ValueError):
        shown = repr(got)
    if len(shown) > 80:
        shown = f"{shown[:77]}..."
    return f"{where}: got {shown}; allowed: {allowed}; fix: {fix}"


def fail(where: str, got: Any, allowed: str, fix: str) -> ConfigError:
    return ConfigError(problem(where, got, allowed, fix))


def argument_error(where: str, got: object, allowed: str, fix: str) -> ValueError:
    """For an argument of a function, which no user has set."""
    return ValueError(f"{where}: got {got}; allowed: {allowed}; {fix}")


def closest(name: object, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The closest match to a misspelled `name` among `names`."""
    if not isinstance(name, str):
        return None
    lowered = {candidate.lower(): candidate for candidate in names}
    found = difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=cutoff)
    return lowered[found[0]] if found else None
