"""Names of configs and seeds in folders and in --expect. `ds_quant.cli.shared.run_folder` reads a run's folder name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ds_quant.cli.shared.errors import CommandError
from ds_quant.cli.shared.run_folder import of_folder, shown

__all__ = ["expected", "names_a_seed", "of_folder", "shown"]

_SEED = re.compile(r"seed-([0-9]+)")
_SEEDS = re.compile(r"([0-9]+)(?:-([0-9]+))?")
_MOST_SEEDS = 10_000


def names_a_seed(folder: Path) -> bool:
    """Whether the folder is called seed-N."""
    return _SEED.fullmatch(folder.name) is not None


def expected(arguments: Iterable[str]) -> dict[str, set[int]]:
    """The seeds of each config in CONFIG=SEEDS. SEEDS is 1,2,3 or, as in a Slurm array, 0-4, or both.

    Raises:
        CommandError: an argument has another form.
    """
    found: dict[str, set[int]] = {}
    for argument in arguments:
        config, _, text = argument.rpartition("=")
        matches = [_SEEDS.fullmatch(part.strip()) for part in text.split(",")]
        seeds: set[int] = set()
        for match in matches:
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
            if not config or not first <= last < first + _MOST_SEEDS:
                raise CommandError(
                    f"--expect: got {argument!r}; allowed: CONFIG=SEEDS with seeds such as 1,2,3 or 0-4 "
                    f"(at most {_MOST_SEEDS} of them); correct it"
                )
            seeds.update(range(first, last + 1))
        found.setdefault(shown(config), set()).update(seeds)
    return found
