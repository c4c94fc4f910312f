"""The folder of a run's measurements: a JSON file for each look, the scalars as CSV, and the report.

A look's file is written whole or not at all. When a run resumes, the looks of steps that it takes again are removed, so
that no step appears twice; when a run starts over, the earlier looks are moved aside.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from ds_quant.base.errors import fail
from ds_quant.base.whole_folder import write_whole
from ds_quant.diagnostics.measurement import Measurement, scalars_csv

SCALARS = "scalars.csv"
REPORT = "report.html"

_LOOK = re.compile(r"step-(\d{8,})\.json")


def to_text(measurements: Iterable[Measurement]) -> str:
    """A JSON list of measurements, one a line."""
    return "[\n" + ",\n".join(found.to_json() for found in measurements) + "\n]\n"


def read_file(path: Path) -> list[Measurement]:
    """The measurements in a file: a list of them, or one.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise fail(str(path), str(error), "a whole file of measurements", "remove it, or measure again") from error
    items = content if isinstance(content, list) else [content]
    if not all(isinstance(item, dict) and "kind" in item for item in items):
        raise fail(str(path), "other JSON", "measurements", "name a folder that diagnostics wrote")
    return [Measurement.from_json(json.dumps(item)) for item in items]


def looks(folder: Path) -> dict[int, Path]:
    """The files of the looks in `folder`, by step, in order."""
    found = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := _LOOK.fullmatch(path.name):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def begin(folder: Path, step: int, *, resumed: bool) -> str | None:
    """Make `folder` ready for a run whose last step taken is `step`; a line on what was in the way. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    line = None
    there = looks(folder)
    if there and not resumed:
        aside = _free_name(folder)
        aside.mkdir()
        for path in [*there.values(), folder / SCALARS, folder / REPORT]:
            if path.exists():
                os.replace(path, aside / path.name)
        line = f"{folder}: {len(there)} looks of an earlier run moved to {aside.name}"
        there = {}
    again = {number: path for number, path in there.items() if number > step}
    for path in again.values():
        path.unlink()
    if again:
        line = f"{folder}: looks from step {min(again)} on removed, since their steps are taken again"
    kept = [found for number, path in there.items() if number <= step for found in read_file(path)]
    write_whole(folder / SCALARS, scalars_csv(kept))
    return line


def add_look(folder: Path, step: int, measurements: list[Measurement]) -> None:
    """Write the look's file, then its lines of the CSV. Raises OSError."""
    write_whole(folder / f"step-{step:08d}.json", to_text(measurements))
    with (folder / SCALARS).open("a", encoding="utf-8") as file:
        file.write(scalars_csv(measurements, header=False))
        file.flush()
        os.fsync(file.fileno())


def _free_name(folder: Path) -> Path:
    number = 1
    while (folder / f"earlier-{number}").exists():
        number += 1
    return folder / f"earlier-{number}"
