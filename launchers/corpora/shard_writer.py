"""Tokenize a corpus of any size once, into the files that corpora/shards.py reads.

The unit of work is a chunk: the documents that fill one training file. Validation documents among them go to a separate
file. Files are written under a temporary name, synced and renamed; then progress.json records where the next chunk
begins. A killed run loses its unfinished chunk and produces exactly the same bytes when it is restarted.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from survival.errors import LaunchError, mistake
from transformers import PreTrainedTokenizerBase

from corpora import shards
from corpora import tokenizer as tokenizers
from corpora.corpus import TRAIN, VALIDATION, Corpus, CorpusArguments, Group, Place
from ds_quant.base.whole_folder import replace_folder, write_json
from ds_quant.cli.shared import terminal, token_ids

_CHARACTERS_AT_ONCE = 1 << 18
"""Small batches, because ids are first Python integers of 36 bytes each."""


def write(args: CorpusArguments) -> shards.Index:
    """Tokenize the corpus into `args.output_dir`, or resume an earlier run; returns the index."""
    folder = Path(str(args.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        for name in (shards.INDEX, shards.PROGRESS):
            _refuse_others(folder / name, args)
        if (folder / shards.INDEX).is_file():
            terminal.say(f"{folder} is complete: nothing is left to do.")
        else:
            _tokenize(folder, args)
    return shards.load(str(folder))


def _tokenize(folder: Path, args: CorpusArguments) -> None:
    corpus = Corpus(args)
    tokenizer = _tokenizer(folder, args, corpus)
    dtype = shards.smallest_dtype(len(tokenizer))
    done: dict[str, Any] = {
        "format": shards.FORMAT,
        "arguments": args.identity(),
        "dtype": dtype.name,
        "vocab_size": len(tokenizer),
        "tokenizer": token_ids.fingerprint(tokenizer),
        TRAIN: [],
        VALIDATION: [],
    }
    place, number = Place(), 0
    if (folder / shards.PROGRESS).is_file():
        progress = json.loads((folder / shards.PROGRESS).read_text())
        place, number = Place(**progress.pop("next")), progress.pop("chunks")
        if {**progress, TRAIN: [], VALIDATION: []} != done:
            got = f"{folder}, whose tokenizer has changed since the run began"
            raise mistake("--output_dir", got, "a folder as the run has left it", "give an empty --output_dir")
        done = progress
        terminal.say(f"Going on after {number} chunks: document {place.number + place.skip} of the corpus is next.")
    chunk = _Chunk(folder, number, dtype)
    begin, tokens = time.monotonic(), 0
    for group, flat, ends in _tokenized(corpus.groups(place), folder / shards.TOKENIZER, dtype, args.num_proc):
        for document in range(group.place.skip, len(group.texts)):
            chunk.write(group.parts[document], flat[ends[document] : ends[document + 1]])
            if chunk.longest >= args.shard_tokens:
                tokens += _add(done, chunk.close())
                number += 1
                after = group.place._replace(skip=document + 1)._asdict()
                write_json(folder / shards.PROGRESS, {**done, "next": after, "chunks": number})
                rate = tokens / (time.monotonic() - begin)
                terminal.say(f"chunk {number}: {tokens} tokens so far, {rate:.0f} tokens/s")
                chunk = _Chunk(folder, number, dtype)
    _add(done, chunk.close())
    for part, fix in ((TRAIN, "give more text"), (VALIDATION, "raise --validation_fraction")):
        if not done[part]:
            raise mistake(
                "corpus",
                f"no document for {part}",
                "one or more",
                f"{fix}, or name a --validation_file, and start over in an empty --output_dir",
            )
    write_json(folder / shards.INDEX, done)
    (folder / shards.PROGRESS).unlink(missing_ok=True)


class _Chunk:
    """The files being written: one for each part that has documents."""

    def __init__(self, folder: Path, number: int, dtype: np.dtype[Any]) -> None:
        self._folder = folder
        self._number = number
        self._dtype = dtype
        self._files: dict[str, Any] = {}
        self._hashes: dict[str, Any] = {}
        self._counts: dict[str, list[int]] = {}

    @property
    def longest(self) -> int:
        """Number of tokens in the longer of the files."""
        return max((tokens for tokens, _ in self._counts.values()), default=0)

    def write(self, part: str, tokens: np.ndarray) -> None:
        """Append a document's tokens to the file of its part."""
        if part not in self._files:
            self._files[part] = self._beside(part).open("wb", buffering=1 << 20)
            self._hashes[part] = hashlib.sha256()
            self._counts[part] = [0, 0]
        content = tokens.astype(self._dtype, copy=False).tobytes()
        self._files[part].write(content)
        self._hashes[part].update(content)
        self._counts[part][0] += len(tokens)
        self._counts[part][1] += 1

    def close(self) -> dict[str, shards.Shard]:
        """Give the files their final names; from here on they survive a crash of the machine."""
        closed = {}
        for part, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            file.close()
            name = f"{part}-{self._number:05d}.bin"
            os.replace(self._beside(part), self._folder / name)
            tokens, documents = self._counts[part]
            closed[part] = shards.Shard(name, tokens, documents, self._hashes[part].hexdigest())
        return closed

    def _beside(self, part: str) -> Path:
        return self._folder / f".{part}.tmp"


def _tokenized(
    groups: Iterator[Group], tokenizer: Path, dtype: np.dtype[Any], processes: int
) -> Iterator[tuple[Group, np.ndarray, np.ndarray]]:
    """Each group with the concatenated ids of its documents, and where each document begins and ends."""
    if processes == 1:
        _start(tokenizer)
        for group in groups:
            yield group, *_encode(group.texts, dtype)
        return
    waiting: deque[tuple[Group, Future[tuple[np.ndarray, np.ndarray]]]] = deque()
    # Spawned, because a forked process would share locks with the threads of the reader and the tokenizer.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start, (tokenizer, True)) as pool:
        try:
            for group in groups:
                waiting.append((group, pool.submit(_encode, group.texts, dtype)))
                if len(waiting) > 2 * processes:
                    group, future = waiting.popleft()
                    yield group, *future.result()
            while waiting:
                group, future = waiting.popleft()
                yield group, *future.result()
        except BrokenProcessPool as error:
            raise LaunchError(
                "A process that tokenizes was killed, perhaps for want of memory. Start the command again, it goes on; "
                "fewer --num_proc need less memory."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


_state: dict[str, token_ids.Encode] = {}
"""The tokenizer of this process, loaded once instead of sent with every group."""


def _start(tokenizer: Path, one_of_many: bool = False) -> None:
    if one_of_many:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _state["encode"] = token_ids.encoder(tokenizers.load(str(tokenizer)))


def _encode(texts: list[str], dtype: np.dtype[Any]) -> tuple[np.ndarray, np.ndarray]:
    arrays: list[np.ndarray] = []
    for batch in _batches(texts):
        arrays.extend(np.array(ids, dtype=dtype) for ids in _state["encode"](batch))
    return np.concatenate(arrays), np.cumsum([0, *(len(ids) for ids in arrays)])


def _batches(texts: list[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _CHARACTERS_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _tokenizer(folder: Path, args: CorpusArguments, corpus: Corpus) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder: created once, then loaded."""
    target = folder / shards.TOKENIZER
    if not target.is_dir():
        if args.tokenizer_name is not None:
            tokenizer = tokenizers.load(args.tokenizer_name)
        else:
            terminal.say("Training the tokenizer on the first documents.")
            tokenizer = tokenizers.train(corpus.training_texts(), vocab_size=int(args.vocab_size or 0))
        beside = folder / ".tokenizer.tmp"
        shutil.rmtree(beside, ignore_errors=True)
        tokenizer.save_pretrained(beside)
        replace_folder(beside, target)
    return tokenizers.load(str(target))


def _add(done: dict[str, Any], closed: dict[str, shards.Shard]) -> int:
    for part, shard in closed.items():
        done[part].append(shard._asdict())
    return sum(shard.tokens for shard in closed.values())


def _refuse_others(path: Path, args: CorpusArguments) -> None:
    if not path.is_file():
        return
    try:
        earlier = json.loads(path.read_text())["arguments"]
    except (ValueError, KeyError, TypeError) as error:
        got, fix = f"a file that is damaged ({error})", "give an empty --output_dir"
        raise mistake(str(path), got, "a whole file", fix) from error
    now = json.loads(json.dumps(args.identity()))
    differing = [name for name in now if earlier.get(name) != now[name]]
    if differing:
        flags = ", ".join(f"--{name}" for name in differing)
        raise mistake(
            "--output_dir",
            f"{path.parent}, which holds the files of another run: {flags} differ "
            f"({differing[0]}: {earlier.get(differing[0])!r}, now {now[differing[0]]!r})",
            "an empty folder, or one of the same run",
            "give the same arguments and text, or another --output_dir",
        )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep a second process out of the folder."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            got, fix = f"{folder}, to which another process is writing", "wait for it, or stop it"
            raise mistake("--output_dir", got, "a folder for this process alone", fix) from error
        yield
