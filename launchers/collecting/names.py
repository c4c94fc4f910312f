"""Config and seed: as a run's folder names them, and as --expect does."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from collecting.errors import CollectError

_SEED = re.compile(r"seed-([0-9]+)")
_CONFIG_AND_SEED = re.compile(r"(.+)-s([0-9]+)")
_SEEDS = re.compile(r"([0-9]+)(?:-([0-9]+))?")
_MOST_SEEDS = 10_000


def of_folder(folder: Path, root: Path) -> tuple[str, int | None]:
    """Config and seed of a run found below `root`; None where the folder's name tells no seed."""
    # Not resolved: what a link is called here counts, not what it points to.
    own, above = Path(os.path.abspath(folder)), Path(os.path.abspath(root))
    if match := _SEED.fullmatch(own.name):
        return shown(own.parent.name), int(match[1])
    if match := _CONFIG_AND_SEED.fullmatch(own.name):
        return shown(match[1]), int(match[2])
    return shown(own.name if above in (own, own.parent) else own.parent.name), None


def names_a_seed(folder: Path) -> bool:
    """Whether the folder is called seed-N."""
    return _SEED.fullmatch(folder.name) is not None


def shown(text: object) -> str:
    """A name or path on one line and in characters that any file can hold: a file system allows other ones too."""
    return " ".join(str(text).encode("utf-8", "backslashreplace").decode().split())


def expected(arguments: Iterable[str]) -> dict[str, set[int]]:
    """The seeds of each config in CONFIG=SEEDS; SEEDS is 1,2,3 or, as for an array of Slurm, 0-4, or both.

    Raises:
        CollectError: an argument is written otherwise.
    """
    found: dict[str, set[int]] = {}
    for argument in arguments:
        config, _, text = argument.rpartition("=")
        matches = [_SEEDS.fullmatch(part.strip()) for part in text.split(",")]
        seeds: set[int] = set()
        for match in matches:
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
            if not config or not first <= last < first + _MOST_SEEDS:
                raise CollectError(
                    f"--expect: got {argument!r}; allowed: CONFIG=SEEDS with seeds such as 1,2,3 or 0-4 "
                    f"(at most {_MOST_SEEDS} of them); correct it"
                )
            seeds.update(range(first, last + 1))
        found.setdefault(shown(config), set()).update(seeds)
    return found
