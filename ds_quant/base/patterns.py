"""Shell patterns on the names of modules and parameters."""

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

from ds_quant.base.errors import ConfigError


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns matches the whole name; `*` crosses dots."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check_patterns(where: str, kind: str, patterns: Iterable[str], names: list[str]) -> None:
    """Raise ConfigError for a pattern that matches none of `names`, which name things of a `kind`."""
    for pattern in patterns:
        if any(fnmatchcase(name, pattern) for name in names):
            continue
        around = (f"*.{pattern}", f"{pattern}.*", f"*.{pattern}.*")
        near = next((name for name in names if matches(name, around)), None)
        if near is None:
            near = next(iter(difflib.get_close_matches(pattern, names, n=1, cutoff=0.3)), None)
        hint = f" (the nearest name is {near!r}; '*' crosses dots)" if near else ""
        raise ConfigError(
            f"{where}: got the pattern {pattern!r}, which matches no {kind} of this model; "
            f"allowed: shell patterns on full {kind.rpartition(' ')[2]} names{hint}; "
            "fix: correct the pattern or remove it"
        )
