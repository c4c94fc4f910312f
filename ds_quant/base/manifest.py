"""manifest.json: which files make up a checkpoint, how long each is, and its SHA-256.

It is written last into the folder that becomes a checkpoint by being renamed: a folder without it was never finished,
or is of a program that writes none.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ds_quant.base.whole_folder import sync, write_json

NAME = "manifest.json"
FORMAT = 1


class FileEntry(NamedTuple):
    """One file of a checkpoint."""

    path: str
    """Relative to the checkpoint, with slashes."""
    size: int
    """In bytes."""
    sha256: str


def list_files(folder: Path) -> list[str]:
    """All files below `folder` but the manifest, as relative paths, sorted: the same list on every rank."""
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted(path for path in found if path != NAME)


def share(paths: list[str], rank: int, world_size: int) -> list[str]:
    """The part of the files that one rank looks after."""
    return paths[rank % world_size :: world_size]


def digest(folder: Path, paths: Iterable[str]) -> list[FileEntry]:
    """Read files and hash them. When this returns, each has been flushed to disk."""
    entries = []
    for path in paths:
        with (folder / path).open("rb") as file:
            os.fsync(file.fileno())
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            entries.append(FileEntry(path, file.tell(), sha256))
    return entries


def write(folder: Path, entries: Iterable[FileEntry], about: dict[str, Any]) -> None:
    """Write the manifest; `about` tells of the run what a restart needs (step, world_size, global_batch_size)."""
    content = {"format": FORMAT, **about, "files": [entry._asdict() for entry in sorted(entries)]}
    write_json(folder / NAME, content)
    for inner in {(folder / entry.path).parent for entry in entries}:
        sync(inner)


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest, or None if there is none. Raises ValueError if it cannot be understood."""
    try:
        text = (folder / NAME).read_text()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"its {NAME} cannot be read ({error})") from error
    try:
        found = json.loads(text)
        entries = [FileEntry(**entry) for entry in found["files"]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"its {NAME} was cut short or was not written by this program") from error
    if found.get("format") != FORMAT:
        raise ValueError(f"its {NAME} has format {found.get('format')!r}, and this program knows {FORMAT}")
    return {**found, "files": entries}


def defect_of_sizes(folder: Path, entries: Iterable[FileEntry]) -> str | None:
    """What is missing or cut short, by looking at sizes alone; None if nothing is."""
    for entry in entries:
        try:
            size = (folder / entry.path).stat().st_size
        except OSError:
            return f"{entry.path} is missing"
        if size != entry.size:
            return f"{entry.path} has {size} bytes instead of {entry.size}"
    return None


def defect_of_contents(folder: Path, entries: Iterable[FileEntry]) -> str | None:
    """What differs from what was written, by reading everything; None if nothing does."""
    for entry in entries:
        try:
            with (folder / entry.path).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            return f"{entry.path} cannot be read ({error.strerror or error})"
        if found != entry.sha256:
            return f"{entry.path} is not what was written (its SHA-256 differs)"
    return None
