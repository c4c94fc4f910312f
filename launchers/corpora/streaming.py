"""Trains on a stream of documents that is divided into lanes and resumes exactly where it stopped.

A lane is a part of the stream with a fixed place in every global batch. The number of lanes belongs to the run, not to
the ranks: each rank serves an equal share of the lanes, each worker process an equal share of its rank's lanes, and
neither reads anything else. A lane's position is a handful of numbers, and every sequence carries it along, so data
that workers read ahead but no step has used is not counted. Any number of ranks that divides the lanes resumes with the
same batches.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fsspec.asyn  # type: ignore[import-untyped]
import numpy as np
import torch
from survival.errors import mistake
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from corpora.document_stream import Stream
from corpora.permutation import Permutation
from ds_quant.cli.shared import token_ids

FORMAT = 1
MOST_LANES = 64
"""Default maximum: each lane keeps a file open and some documents in memory."""
SHUFFLED_TOGETHER = 8192
"""Number of documents that are shuffled together, over all lanes."""


class Position(NamedTuple):
    """The next token of a lane. This is enough to resume, because a finished sequence leaves nothing over."""

    epoch: int = 0
    turn: int = 0
    """The index in this epoch's order of parts."""
    before: dict[str, Any] | None = None
    """Where the group of documents begins, as a state of `datasets`."""
    row: int = 0
    """The group's first document within the part."""
    document: int = 0
    """The index in the group's order of documents."""
    token: int = 0


class Share(NamedTuple):
    """The sequences of one lane for one step."""

    lane: int
    sequences: np.ndarray
    """Token ids [sequences, context]."""
    after: Position


class Plan(NamedTuple):
    """Everything that determines the order of sequences. Two runs with equal plans read the same."""

    source: str
    parts: int
    lanes: int
    context_length: int
    seed: int
    group: int
    """Number of documents of a lane that are shuffled together."""
    kept_out: dict[str, int]
    """Number of documents at the start of each part that are for validation, by the number of the part."""
    tokenizer: str


class Lane:
    """The endless sequences of one lane. Each epoch takes the parts and the documents in another order."""

    def __init__(self, stream: Stream, encode: token_ids.Encode, plan: Plan, number: int) -> None:
        self._stream = stream
        self._encode = encode
        self._plan = plan
        self._number = number
        # If there are fewer parts than lanes, each lane of a part takes every n-th document of it.
        sharing = next(n for n in range(min(plan.parts, plan.lanes), 0, -1) if plan.lanes % n == 0)
        self._parts = range(number % sharing, plan.parts, sharing)
        self._stride, self._offset = plan.lanes // sharing, number // sharing

    def sequences(self, begin: Position) -> Iterator[tuple[np.ndarray, Position]]:
        """Sequences of shape [context] from `begin` on, each with the position after it."""
        pieces: list[np.ndarray] = []
        missing = self._plan.context_length
        first = begin.token
        for position, ids in self._documents(begin):
            offset, first = first, 0
            while offset < len(ids):
                pieces.append(ids[offset : offset + missing])
                offset += len(pieces[-1])
                missing -= len(pieces[-1])
                if missing == 0:
                    yield np.concatenate(pieces), position._replace(token=offset)
                    pieces, missing = [], self._plan.context_length

    def _documents(self, begin: Position) -> Iterator[tuple[Position, np.ndarray]]:
        position = begin
        while True:
            order = Permutation(len(self._parts), self._plan.seed, position.epoch, self._number)
            turns = order(np.arange(len(self._parts)))
            empty = position == Position(epoch=position.epoch)
            for turn in range(position.turn, len(turns)):
                for place, ids in self._part(self._parts[int(turns[turn])], position._replace(turn=turn)):
                    empty = False
                    yield place, ids
                position = Position(epoch=position.epoch)
            if empty:
                raise mistake(
                    self._stream.where,
                    f"lane {self._number} of {self._plan.lanes}, which has no document to read",
                    "at least one document for each lane",
                    "give fewer --stream_lanes, or more documents",
                )
            position = Position(epoch=position.epoch + 1)

    def _part(self, part: int, begin: Position) -> Iterator[tuple[Position, np.ndarray]]:
        row, first = begin.row, begin.document
        kept_out = self._plan.kept_out.get(str(part), 0)
        for before, texts in self._stream.groups(part, self._plan.group * self._stride, begin.before):
            own = [
                text
                for number, text in enumerate(texts, row - kept_out)
                if number >= 0 and number % self._stride == self._offset
            ]
            if own:
                order = Permutation(len(own), self._plan.seed, begin.epoch, part, row)(np.arange(len(own)))
                for document in range(first, len(own)):
                    place = Position(begin.epoch, begin.turn, before, row, document)
                    yield place, np.array(self._encode([own[order[document]]])[0], dtype=np.int32)
            row, first = row + len(texts), 0


class LaneStream(IterableDataset[Share]):
    """The lanes of one rank, from `positions` on; each worker process of a DataLoader reads a share of them."""

    def __init__(
        self, stream: Stream, encode: token_ids.Encode, plan: Plan, *, global_batch: int, rank: int, world_size: int
    ) -> None:
        super().__init__()
        self._stream = stream
        self._encode = encode
        self.global_batch = global_batch
        self.rank = rank
        self.world_size = world_size
        self._take(plan)
        self.positions = dict.fromkeys(self.lanes, Position())

    def _take(self, plan: Plan) -> None:
        if plan.lanes % self.world_size or self.global_batch % plan.lanes:
            fitting = [n for n in range(1, plan.lanes + 1) if plan.lanes % n == 0]
            raise mistake(
                "--stream_lanes",
                f"{plan.lanes} lanes that cannot be shared by {self.world_size} processes in a global batch of "
                f"{self.global_batch}",
                f"processes that divide the lanes (numbers that do: {', '.join(map(str, fitting))}), and lanes that "
                "divide the batch",
                "start with another number of processes, or give a new run other --stream_lanes",
            )
        self.plan = plan
        self.lanes = range(self.rank, plan.lanes, self.world_size)

    def workers(self, asked_for: int) -> int:
        """The most worker processes, up to `asked_for`, that can share the lanes evenly."""
        return next((n for n in range(min(asked_for, len(self.lanes)), 0, -1) if len(self.lanes) % n == 0), 0)

    def __iter__(self) -> Iterator[Share]:
        worker = get_worker_info()
        if worker is not None:
            # A forked process must not wait for locks that its parent's threads hold.
            fsspec.asyn.reset_lock()
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        # A DataLoader asks its workers in turn, so the lanes of a step come in order.
        own = self.lanes if worker is None else self.lanes[worker.id :: worker.num_workers]
        reading = {n: Lane(self._stream, self._encode, self.plan, n).sequences(self.positions[n]) for n in own}
        count = self.global_batch // self.plan.lanes
        while True:
            for number, lane in reading.items():
                taken = [next(lane) for _ in range(count)]
                yield Share(number, np.stack([ids for ids, _ in taken]), taken[-1][1])

    def state(self, positions: dict[int, Position]) -> dict[str, Any]:
        """The state of this rank for a checkpoint."""
        return {
            "format": FORMAT,
            "rank": self.rank,
            "world_size": self.world_size,
            "plan": self.plan._asdict(),
            "positions": {str(lane): position._asdict() for lane, position in positions.items()},
        }

    def load(self, checkpoint: str) -> None:
        """Resume from the files of all ranks in a checkpoint. Raises LaunchError if the data differ."""
        files = sorted(Path(checkpoint).glob("data_state_rank*.json"))
        try:
            states = [json.loads(file.read_text()) for file in files]
            plans = [Plan(**state["plan"]) for state in states if state["format"] == FORMAT]
            found = {int(n): Position(**at) for state in states for n, at in state["positions"].items()}
        except (ValueError, KeyError, TypeError) as error:
            got, fix = f"a position in the stream that is damaged ({error})", "resume from another checkpoint"
            raise mistake(str(checkpoint), got, "whole files data_state_rank*.json", fix) from error
        if not plans or len(plans) != len(states) or set(found) != set(range(plans[0].lanes)):
            got = f"{len(files)} files data_state_rank*.json"
            raise mistake(
                str(checkpoint), got, "the positions of all lanes of the stream", "resume from another checkpoint"
            )
        for name, old in plans[0]._asdict().items():
            new = getattr(self.plan, name)
            if new != old and name not in ("lanes", "group"):
                raise mistake(
                    str(checkpoint),
                    f"another stream: its {name} is {old!r}, here it is {new!r}",
                    "the stream that the checkpoint was reading",
                    "resume with the same data, seed, tokenizer and --context_length, or start afresh",
                )
        self._take(plans[0])
        self.positions = {lane: found[lane] for lane in self.lanes}


class LaneLoader:
    """The endless micro-batches of this rank from a `LaneStream`. It records what the steps have used."""

    def __init__(
        self,
        stream: LaneStream,
        *,
        batch_size: int,
        workers: int,
        prefetch_factor: int | None = None,
        start_method: str | None = None,
    ) -> None:
        self.dataset = stream
        self.batch_size = batch_size
        self._workers = stream.workers(workers)
        self._prefetch_factor = prefetch_factor if self._workers else None
        self._start_method = start_method if self._workers else None
        self.positions = stream.positions

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        loader = DataLoader(
            self.dataset,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self._workers,
            prefetch_factor=self._prefetch_factor,
            multiprocessing_context=self._start_method,
            # A separate generator; otherwise the workers' seeds would be drawn from the one that dropout uses.
            generator=torch.Generator().manual_seed(0),
        )
        shares = iter(loader)
        while True:
            step = [next(shares) for _ in self.dataset.lanes]
            ids = torch.from_numpy(np.concatenate([share.sequences for share in step]).astype(np.int64))
            *earlier, last = ids.split(self.batch_size)
            for part in earlier:
                yield {"input_ids": part, "labels": part.clone()}
            # The Trainer takes all micro-batches of a step before it computes, so a yielded batch counts as used.
            self.positions = {share.lane: share.after for share in step}
            yield {"input_ids": last, "labels": last.clone()}

    def save(self, folder: str) -> None:
        """Write this rank's position into a checkpoint's folder."""
        state = self.dataset.state(self.positions)
        (Path(folder) / f"data_state_rank{self.dataset.rank}.json").write_text(json.dumps(state))


def choose_lanes(asked_for: int | None, *, parts: int, global_batch: int, world_size: int) -> int:
    """The number of lanes: `asked_for`, or the number of parts, as far as batch and ranks allow."""
    if asked_for is not None:
        if asked_for < 1 or global_batch % asked_for or asked_for % world_size:
            allowed = f"divisors of the global batch of {global_batch} that are multiples of the {world_size} processes"
            raise mistake("--stream_lanes", asked_for, allowed, "correct it")
        return asked_for
    limit = max(world_size, min(parts, MOST_LANES))
    return next(n for n in range(limit, 0, -1) if global_batch % n == 0 and n % world_size == 0)


def _as_it_is(share: Any) -> Any:
    return share
