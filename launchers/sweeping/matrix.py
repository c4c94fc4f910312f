"""Parses the requested configs and seeds."""

from __future__ import annotations

import difflib
import fnmatch
import re
from dataclasses import dataclass
from pathlib import Path

from ds_quant.cli.shared.errors import CommandError

_SEEDS = re.compile(r"([0-9]+)(?:-([0-9]+))?")
_MOST_SEEDS = 10_000
# collect.py must read a folder of this name as a config, and --expect as one word.
_NAME = re.compile(r"[A-Za-z0-9_.+-]+")


@dataclass(frozen=True)
class Config:
    """A DeepSpeed JSON, and the name under which its runs are collected."""

    name: str
    path: str


def shipped(folder: Path) -> dict[str, Path]:
    """The configs in `folder` and its subfolder `paper`, by name, sorted."""
    found = {path.stem: path for path in [*folder.glob("*.json"), *folder.glob("paper/*.json")]}
    return dict(sorted(found.items()))


def configs(text: str, folder: Path) -> list[Config]:
    """The configs named in `text`: words such as `w8a8`, `paper_*` or `my/own.json`; all shipped ones if it is empty.

    Raises:
        CommandError: a word matches no config, or two configs have the same name.
    """
    known = shipped(folder)
    if not known:
        raise CommandError(f"ds_configs: got {folder}, with no .json in it; allowed: the repository's own; restore it")
    found: dict[str, Path] = {}
    for word in text.replace(",", " ").split() or known:
        for path in _matching(word, known):
            if found.setdefault(path.stem, path) != path:
                raise CommandError(
                    f"CONFIGS: got {found[path.stem]} and {path}, whose runs would share a folder; allowed: each name "
                    "once; rename one"
                )
            if not _NAME.fullmatch(path.stem):
                raise CommandError(
                    f"CONFIGS: got {path}; allowed: names of letters, digits and . _ + -, since it names a folder; "
                    "rename it"
                )
    return [Config(name, str(path)) for name, path in found.items()]


def _matching(word: str, known: dict[str, Path]) -> list[Path]:
    if "/" in word:
        path = Path(word)
        if path.suffix != ".json" or not path.is_file():
            raise CommandError(f"CONFIGS: got {word!r}; allowed: the path of a .json file that is there; correct it")
        return [path]
    name = word.removesuffix(".json")
    matches = [path for stem, path in known.items() if fnmatch.fnmatchcase(stem, name)]
    if not matches:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}"
        raise CommandError(
            f"CONFIGS: got {word!r}; allowed: names and patterns of files in ds_configs, and paths with a / of others; "
            f"{hint}"
        )
    return matches


def seeds(text: str) -> list[int]:
    """The seeds in `text`, in order: numbers and ranges such as 0-4, separated by blanks or commas.

    Raises:
        CommandError: a part is neither a number nor a range, or `text` is empty.
    """
    found: dict[int, None] = {}
    for part in text.replace(",", " ").split():
        match = _SEEDS.fullmatch(part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        # torch and numpy accept 32-bit seeds.
        if not first <= last < min(first + _MOST_SEEDS, 2**32):
            raise CommandError(
                f"SEEDS: got {part!r}; allowed: numbers and ranges such as '0 1 2', '1,2,3' or '0-4' "
                f"(at most {_MOST_SEEDS} in a range); correct it"
            )
        found.update(dict.fromkeys(range(first, last + 1)))
    if not found:
        raise CommandError(f"SEEDS: got {text!r}; allowed: at least one, such as '0 1 2' or '0-4'; give one")
    return list(found)
