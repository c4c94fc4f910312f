"""The corpus to be tokenized once: its documents in order, and which of them are for validation."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from survival.errors import mistake

from corpora import document_stream
from corpora.document_stream import Stream
from ds_quant.cli.shared import text_files
from ds_quant.planning.presets import PYTHON_SOURCE

TRAIN, VALIDATION = "train", "validation"
_GROUP = 64
"""Documents tokenized together: enough to keep a process busy, few enough that a hundred groups fit in memory."""


def _flag(help_text: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass
class CorpusArguments:
    """Which text to tokenize, and how."""

    output_dir: str | None = _flag("Folder for the token files; it may contain an unfinished run with the same flags.")
    train_file: list[str] | None = field(
        default=None, metadata={"help": "Files or patterns: .txt and .py (one document each), .jsonl, .json, .parquet."}
    )
    dataset_name: str | None = _flag("A data set on the hub, a folder that `datasets` reads, or `python-source`.")
    dataset_config_name: str | None = _flag("Configuration of that data set.")
    text_column: str = _flag("Column that holds the text of a document.", default="text")
    tokenizer_name: str | None = _flag("Tokenizer: a folder or a hub name.")
    vocab_size: int | None = _flag("Train a SentencePiece BPE tokenizer of this size on the first documents.")
    validation_file: list[str] | None = field(
        default=None, metadata={"help": "Files to validate on. Default: some of the documents."}
    )
    validation_documents: int | None = _flag("Keep this many documents from the start for validation.")
    validation_fraction: float = _flag("Share of the documents kept for validation, chosen by --seed.", default=0.0005)
    seed: int = _flag("Chooses the documents for validation.", default=42)
    shard_tokens: int = _flag("A file ends with the document that brings it to this many tokens.", default=100_000_000)
    num_proc: int = _flag("Number of tokenizing processes. The files are the same for any number.", default=1)
    verify: bool = _flag("Only read the files in --output_dir and compare their checksums.", default=False)

    def check(self) -> None:
        """Raise LaunchError for flags that do not fit together."""
        if self.output_dir is None:
            raise mistake("--output_dir", "none", "a folder for the token files", "give it")
        if self.verify:
            return
        if (self.train_file is None) == (self.dataset_name is None):
            got = "none" if self.train_file is None else "both"
            raise mistake("--train_file, --dataset_name", got, "one of them, which names the text", "give just one")
        if (self.tokenizer_name is None) == (self.vocab_size is None):
            got = "none" if self.vocab_size is None else "both"
            allowed = "one of them: a tokenizer, or the size of one to train on the text"
            raise mistake("--tokenizer_name, --vocab_size", got, allowed, "give just one")
        if self.validation_file is not None and self.validation_documents is not None:
            allowed = "one of them, which names the validation text"
            raise mistake("--validation_file, --validation_documents", "both", allowed, "give just one")
        if not 0 < self.validation_fraction < 1:
            raise mistake("--validation_fraction", self.validation_fraction, "between 0 and 1", "correct it")
        for flag in ("validation_documents", "shard_tokens", "num_proc"):
            if getattr(self, flag) is not None and getattr(self, flag) < 1:
                raise mistake(f"--{flag}", getattr(self, flag), "1 or more", "correct it")

    def identity(self) -> dict[str, Any]:
        """All settings that the bytes of the files depend on, as JSON. Text files are represented by their sizes."""
        values = dataclasses.asdict(self)
        for name in ("output_dir", "num_proc", "verify"):
            del values[name]
        for flag in ("train_file", "validation_file"):
            if values[flag] is not None:
                files = text_files.files_of(values[flag], f"--{flag}")
                values[flag] = [[str(Path(file).resolve()), Path(file).stat().st_size] for file in files]
        return values


class Place(NamedTuple):
    """A document of the corpus, and how to return to it."""

    source: int = 0
    part: int = 0
    before: dict[str, Any] | None = None
    """Where its group of documents begins, as a state of `datasets`."""
    number: int = 0
    """The group's first document, counted over all sources of the training text."""
    skip: int = 0
    """Documents of the group before this one."""


class Group(NamedTuple):
    """Documents that are tokenized together."""

    place: Place
    texts: list[str]
    parts: list[str]
    """For each document: `train` or `validation`."""


class Corpus:
    """All documents in a fixed order, streamed rather than kept. Reading can resume from any `Place`."""

    def __init__(self, args: CorpusArguments) -> None:
        self._args = args
        name, column = args.dataset_name, args.text_column
        validation: list[Stream] = []
        if args.train_file is not None:
            train = document_stream.from_files(args.train_file, column, "--train_file")
        elif name == PYTHON_SOURCE:
            train = document_stream.from_files(text_files.python_source(), "text", PYTHON_SOURCE)
        else:
            hub = document_stream.from_hub(str(name), args.dataset_config_name, column)
            train = [hub[TRAIN]]
            if VALIDATION in hub and args.validation_documents is None:
                validation = [hub[VALIDATION]]
        if args.validation_file is not None:
            validation = document_stream.from_files(args.validation_file, column, "--validation_file")
        # Validation first: it is small, and a mistake in it should show before days of tokenizing.
        self._sources = [*((VALIDATION, stream) for stream in validation), *((TRAIN, stream) for stream in train)]
        self._whole = bool(validation)
        counted = args.validation_documents is not None
        self._book = None if validation or counted else self._only_document(train)

    def groups(self, begin: Place) -> Iterator[Group]:
        """Documents from the group of `begin` on; that group includes those before `begin.skip`."""
        if self._book is not None:
            yield Group(begin, self._book, [TRAIN, VALIDATION])
            return
        number = begin.number
        for source in range(begin.source, len(self._sources)):
            kind, stream = self._sources[source]
            for part in range(begin.part if source == begin.source else 0, stream.num_parts):
                before = begin.before if (source, part) == (begin.source, begin.part) else None
                for group in stream.groups(part, _GROUP, before):
                    numbers = range(number, number + len(group.texts))
                    place = Place(source, part, group.before, number, begin.skip if number == begin.number else 0)
                    yield Group(place, group.texts, [self._kind(kind, n) for n in numbers])
                    number += len(group.texts)

    def training_texts(self) -> Iterator[str]:
        """The texts to train a tokenizer on, in order."""
        for group in self.groups(Place()):
            yield from (text for text, kind in zip(group.texts, group.parts, strict=True) if kind == TRAIN)

    def _kind(self, kind: str, number: int) -> str:
        args = self._args
        if self._whole:
            return kind
        if args.validation_documents is not None:
            return VALIDATION if number < args.validation_documents else TRAIN
        digest = hashlib.sha256(f"{args.seed} {number}".encode()).digest()
        return VALIDATION if int.from_bytes(digest[:8], "big") < args.validation_fraction * 2**64 else TRAIN

    def _only_document(self, train: list[Stream]) -> list[str] | None:
        """The two pieces of a corpus that is a single document: its end is for validation."""
        texts: list[str] = []
        for stream in train:
            for part in range(stream.num_parts):
                # One at a time, because a document may be a whole book; a second one ends the search.
                for group in stream.groups(part, 1):
                    texts += group.texts
                    if len(texts) == 2:
                        return None
        if not texts:
            return None
        # Same split as text_files.split, so that both ways of training see the same text.
        cut = max(1, int(len(texts[0]) * (1 - self._args.validation_fraction)))
        return [texts[0][:cut], texts[0][cut:]]
