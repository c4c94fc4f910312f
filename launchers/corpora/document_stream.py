"""Documents that are streamed instead of loaded, part by part, from any position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import datasets
from survival.errors import LaunchError

from corpora import hub
from ds_quant.cli.shared import text_files


class Group(NamedTuple):
    """Some consecutive documents of a stream."""

    before: dict[str, Any] | None
    """The position of the first document, as `Stream.groups` takes it; None: the start of the part."""
    texts: list[str]


class Stream(NamedTuple):
    """Documents that are read in sequence; the parts (files, or row groups of Parquet) are independent."""

    rows: datasets.IterableDataset
    column: str
    where: str
    """The source named in errors."""
    files: Sequence[str] = ()
    """The file of each part, if the parts are the user's files."""

    @property
    def num_parts(self) -> int:
        """The number of parts."""
        return int(self.rows.num_shards)

    def groups(self, part: int, size: int, begin: dict[str, Any] | None = None) -> Iterator[Group]:
        """The documents of a part from `begin` on, `size` at a time (the last group may have fewer)."""
        rows = self.rows.shard(self.num_parts, part)
        if begin is not None:
            rows.load_state_dict(begin)
        where = self.files[part] if self.files else f"part {part} of {self.where}"
        # iter(), not __iter__: in a worker of a DataLoader, __iter__ would divide the part once more.
        batches = rows.iter(batch_size=size)
        before = begin
        while batch := text_files.guarded(lambda: next(batches, None), where, *text_files.UNREADABLE):
            texts = batch.get(self.column)
            if texts is None or any(not isinstance(text, str) for text in texts):
                raise LaunchError(
                    f"{where}: got documents without text in the column {self.column!r}; allowed: text in each "
                    f"document; fix: name another of the columns {', '.join(batch)} with --text_column, or remove "
                    "these documents"
                )
            yield Group(before, texts)
            before = rows.state_dict()

    def texts(self, part: int, begin: int = 0) -> Iterator[str]:
        """The texts of a part from the document `begin` on."""
        for number, text in enumerate(chain.from_iterable(group.texts for group in self.groups(part, 64))):
            if number >= begin:
                yield text

    def in_smaller_parts(self) -> Stream:
        """The same documents in as many parts as the file type allows: Parquet has row groups, others have none."""
        rows = self.rows.reshard()
        return self if rows.num_shards == self.num_parts else self._replace(rows=rows, files=())


def from_files(patterns: list[str], text_column: str, flag: str) -> list[Stream]:
    """The documents of `read_files`, in the same order, without loading them: one stream for each file type."""
    streams = []
    for reader, files in text_files.by_reader(patterns, flag):
        text = reader == "text"
        options = {"sample_by": "document"} if text else {}
        rows = text_files.guarded(
            partial(datasets.load_dataset, reader, data_files=files, split="train", streaming=True, **options),
            f"{flag} {' '.join(patterns)}",
            f"what cannot be read as {reader}",
            f"whole files of {reader}",
            "check that the files are whole and of the kind their names say",
        )
        where = f"{flag} {files[0]}"
        column = "text" if text else text_column
        streams.append(Stream(text_files.only(rows, column, where), column, where, files))
    return streams


def from_hub(name: str, config: str | None, text_column: str) -> dict[str, Stream]:
    """The splits `train` and, if there is one, `validation` of a data set on the hub or a folder."""
    loaded = hub.load(name, config, streaming=True)
    parts = [part for part in ("train", "validation") if part in loaded]
    return {part: Stream(text_files.only(loaded[part], text_column, name), text_column, name) for part in parts}


def first_documents(stream: Stream, count: int) -> tuple[list[str], dict[int, int]]:
    """The texts of the first documents of a stream, and how many come from each part."""
    texts: list[str] = []
    taken: dict[int, int] = {}
    for part in range(stream.num_parts):
        for text in stream.texts(part):
            if len(texts) == count:
                return texts, taken
            texts.append(text)
            taken[part] = taken.get(part, 0) + 1
    return texts, taken
