"""What the folder of a run tells: its config and seed by its name, and the figures that were logged."""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path

_SEED = re.compile(r"seed-([0-9]+)")
_CONFIG_AND_SEED = re.compile(r"(.+)-s([0-9]+)")


def of_folder(folder: Path, root: Path) -> tuple[str, int | None]:
    """Config and seed of a run found below `root`; None where the folder's name tells no seed."""
    # Not resolved: the link's own name counts, not its target's.
    own, above = Path(os.path.abspath(folder)), Path(os.path.abspath(root))
    if match := _SEED.fullmatch(own.name):
        return shown(own.parent.name), int(match[1])
    if match := _CONFIG_AND_SEED.fullmatch(own.name):
        return shown(match[1]), int(match[2])
    return shown(own.name if above in (own, own.parent) else own.parent.name), None


def shown(text: object) -> str:
    """A name or path on one line and in characters that any file can hold: a file system allows other ones too."""
    return " ".join(str(text).encode("utf-8", "backslashreplace").decode().split())


def read_metrics(path: Path) -> list[dict[str, float | None]]:
    """The rows of a metrics.csv, empty fields as None."""
    with path.open(newline="") as file:
        return [{key: float(value) if value else None for key, value in row.items()} for row in csv.DictReader(file)]
