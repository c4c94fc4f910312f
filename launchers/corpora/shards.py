"""Reads a tokenized corpus through memory maps: files of token ids, an index, and the tokenizer.

FOLDER/index.json lists the files. FOLDER/train-00000.bin and so on contain only token ids, little-endian; each document
ends with EOS. `launchers/tokenize_corpus.py` writes them; corpora/shard_writer.py describes how.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from survival.errors import mistake
from transformers import PreTrainedTokenizerBase

from corpora import packing
from corpora import tokenizer as tokenizers
from ds_quant.cli.shared import token_ids

FORMAT = 1
INDEX, PROGRESS, TOKENIZER = "index.json", "progress.json", "tokenizer"
_MOST_OPEN = 256
"""Maximum number of open maps: each needs a file descriptor, of which a process has about a thousand."""


class Shard(NamedTuple):
    """One file of token ids."""

    file: str
    tokens: int
    documents: int
    sha256: str


class Index(NamedTuple):
    """The content of index.json."""

    folder: Path
    dtype: np.dtype[Any]
    vocab_size: int
    """Ids are below this."""
    tokenizer: str
    """Fingerprint of the tokenizer that made the ids."""
    train: list[Shard]
    validation: list[Shard]


class PackedShards(packing.Packed):
    """The documents of all files.

    Memory does not grow with the corpus: files are mapped while they are read, and the kernel may drop their pages.
    """

    def __init__(self, index: Index, files: list[Shard], context_length: int) -> None:
        self._folder = index.folder
        self._dtype = index.dtype
        self._names = [shard.file for shard in files]
        self._maps: OrderedDict[int, np.ndarray] = OrderedDict()
        self._contents = hashlib.sha256("".join(shard.sha256 for shard in files).encode()).hexdigest()
        super().__init__((shard.tokens for shard in files), context_length)

    def state(self, seed: int) -> dict[str, Any]:
        """What the order of the sequences depends on, besides the step. A checkpoint stores it for comparison."""
        return {"format": FORMAT, "contents": self._contents, "context_length": self.context_length, "seed": seed}

    def _tokens(self, number: int) -> np.ndarray:
        """The ids of one file."""
        tokens = self._maps.pop(number, None)
        if tokens is None:
            tokens = self._open(number)
            if len(self._maps) >= _MOST_OPEN:
                self._maps.popitem(last=False)
        self._maps[number] = tokens
        return tokens

    def _open(self, number: int) -> np.ndarray:
        size = int(self._starts[number + 1] - self._starts[number])
        if size == 0:
            return np.empty(0, self._dtype)
        with (self._folder / self._names[number]).open("rb") as opened:
            mapped = mmap.mmap(opened.fileno(), size * self._dtype.itemsize, access=mmap.ACCESS_READ)
        # A sequence is a few KiB at a random position, so reading ahead would fetch many times as much from the disk.
        mapped.madvise(mmap.MADV_RANDOM)
        return np.frombuffer(mapped, dtype=self._dtype)

    def __getstate__(self) -> dict[str, Any]:
        # A worker process opens its own maps; pickling these would copy their content.
        return {**self.__dict__, "_maps": OrderedDict()}


def load(folder: str) -> Index:
    """Read the index and compare it with the files. Raises LaunchError for missing or truncated files."""
    root = Path(folder)
    if not (root / INDEX).is_file():
        if (root / PROGRESS).is_file():
            got = f"{folder}, where a corpus is not tokenized to its end"
            fix = "run launchers/tokenize_corpus.py again with the same arguments to resume"
            raise mistake("--train_shards", got, "whole corpora", fix)
        got = f"{folder}, where there is no {INDEX}"
        raise mistake("--train_shards", got, "folders of launchers/tokenize_corpus.py", "make one with it")
    try:
        content = json.loads((root / INDEX).read_text())
        if content["format"] != FORMAT:
            got = f"a file that has format {content['format']}"
            raise mistake(str(root / INDEX), got, f"format {FORMAT}", "tokenize the corpus again")
        parts = {part: [Shard(**shard) for shard in content[part]] for part in ("train", "validation")}
        dtype = np.dtype(content["dtype"]).newbyteorder("<")
        index = Index(root, dtype, content["vocab_size"], content["tokenizer"], **parts)
    except (ValueError, KeyError, TypeError) as error:
        got, fix = f"a file that is damaged ({error})", "tokenize the corpus again"
        raise mistake(str(root / INDEX), got, "a whole file", fix) from error
    for shard in [*index.train, *index.validation]:
        _check_size(root / shard.file, shard.tokens * dtype.itemsize)
    return index


def verify(index: Index) -> None:
    """Read every file and compare its checksum. Raises LaunchError for the first that differs."""
    for shard in [*index.train, *index.validation]:
        with (index.folder / shard.file).open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if found != shard.sha256:
            raise mistake(
                str(index.folder / shard.file),
                f"a file that has changed: its SHA-256 is {found}",
                f"{shard.sha256}, as {INDEX} says",
                "copy it again, or tokenize the corpus again",
            )


def load_tokenizer(index: Index, *, asked_for: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer that produced the ids; if `asked_for` names a tokenizer, it must be the same."""
    tokenizer = tokenizers.load(str(index.folder / TOKENIZER))
    if token_ids.fingerprint(tokenizer) != index.tokenizer or len(tokenizer) != index.vocab_size:
        got, fix = "a tokenizer that is not the one of the shards", "restore it, or tokenize the corpus again"
        raise mistake(str(index.folder / TOKENIZER), got, "the tokenizer that they were made with", fix)
    if asked_for is not None and token_ids.fingerprint(tokenizers.load(asked_for)) != index.tokenizer:
        raise mistake(
            "--tokenizer_name",
            f"{asked_for}, another tokenizer than the one of the shards",
            f"the one that --train_shards {index.folder} was made with",
            "leave --tokenizer_name out, or tokenize the corpus with it",
        )
    return tokenizer


def smallest_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype on disk for the ids of a vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32).newbyteorder("<")


def _check_size(path: Path, expected: int) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        got, fix = f"{path}, which cannot be read ({error.strerror})", "copy it again, or tokenize the corpus again"
        raise mistake("--train_shards", got, f"the files that {INDEX} lists", fix) from error
    if found != expected:
        got, fix = f"{path}, which has {found} bytes", "copy it again, or tokenize the corpus again"
        raise mistake("--train_shards", got, f"{expected} bytes, as {INDEX} says", fix)
