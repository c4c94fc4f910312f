"""Streams that are shared out among lanes: nothing twice, nothing lost, and exactly resumable."""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from conftest import ROOT
from corpora import document_stream
from corpora.permutation import Permutation
from corpora.streaming import Lane, LaneLoader, LaneStream, Plan, Position, choose_lanes
from helpers.launching import run_ranks
from survival.errors import LaunchError

EOS = 1
LENGTH = 8


def encode(texts: list[str]) -> list[list[int]]:
    """A document's text is its number; it becomes that number, some times over."""
    return [[*([int(text)] * (int(text) * 7 % 19)), EOS] for text in texts]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """100 documents, numbered from 2: in five files of rows, five Parquet files, one file of rows."""
    root = tmp_path_factory.mktemp("stream")
    numbers = [str(n) for n in range(2, 102)]
    for name, files in (("rows", 5), ("parquet", 5), ("one", 1)):
        (root / name).mkdir()
        for file in range(files):
            own = numbers[file * 100 // files : (file + 1) * 100 // files]
            path = root / name / f"{file}"
            if name == "parquet":
                content = datasets.Dataset.from_dict({"text": own, "more": own})
                content.to_parquet(path.with_suffix(".parquet"), batch_size=6)
            else:
                path.with_suffix(".jsonl").write_text("".join(json.dumps({"text": n, "x": 1}) + "\n" for n in own))
    return {path.name: path for path in root.iterdir()}


def plan(stream: document_stream.Stream, lanes: int, **more: Any) -> Plan:
    values = {"source": "here", "context_length": LENGTH, "seed": 3, "group": 4, "kept_out": {}, "tokenizer": "t"}
    return Plan(parts=stream.num_parts, lanes=lanes, **{**values, **more})


def opened(folder: Path, *, lanes: int, batch: int, rank: int = 0, world_size: int = 1, **more: Any) -> LaneStream:
    stream = document_stream.from_hub(str(folder), None, "text")["train"]
    return LaneStream(stream, encode, plan(stream, lanes, **more), global_batch=batch, rank=rank, world_size=world_size)


def batches(stream: LaneStream, count: int, *, size: int = 2, workers: int = 0) -> tuple[list[Any], LaneLoader]:
    loader = LaneLoader(stream, batch_size=size, workers=workers, prefetch_factor=2 if workers else None)
    return [batch["input_ids"].tolist() for batch in islice(loader, count)], loader


@pytest.mark.parametrize(("name", "lanes"), [("rows", 1), ("rows", 2), ("rows", 10), ("parquet", 4), ("one", 6)])
def test_an_epoch_of_all_lanes_has_every_document_once(folders: dict[str, Path], name: str, lanes: int) -> None:
    stream = document_stream.from_hub(str(folders[name]), None, "text")["train"]
    orders = []
    for epoch in (0, 1):
        order: list[int] = []
        for number in range(lanes):
            lane = Lane(stream, encode, plan(stream, lanes, kept_out={"0": 3}), number)
            for position, ids in lane._documents(Position(epoch=epoch)):
                if position.epoch != epoch:
                    break
                # Documents without a token of their own are in the count of the rest.
                order.extend(ids[:1].tolist())
            seen = Counter(order)
        whole = [n for n in range(5, 102) if n * 7 % 19]
        assert {n: seen[n] for n in whole} == dict.fromkeys(whole, 1)
        assert not {2, 3, 4} & seen.keys()
        assert seen[EOS] == 97 - len(whole)
        orders.append(order)
    assert orders[0] != orders[1] != sorted(orders[1])


def test_sequences_are_the_documents_end_to_end(folders: dict[str, Path]) -> None:
    stream = document_stream.from_hub(str(folders["rows"]), None, "text")["train"]
    lane = Lane(stream, encode, plan(stream, 2), 1)
    documents = [token for _, ids in islice(lane._documents(Position()), 200) for token in ids.tolist()]
    sequences = [token for ids, _ in islice(lane.sequences(Position()), 150) for token in ids.tolist()]
    assert sequences == documents[: 150 * LENGTH]


@pytest.mark.parametrize(("name", "lanes"), [("rows", 1), ("rows", 10), ("parquet", 5), ("one", 3)])
def test_every_position_goes_on_exactly(folders: dict[str, Path], name: str, lanes: int) -> None:
    stream = document_stream.from_hub(str(folders[name]), None, "text")["train"]
    lane = Lane(stream, encode, plan(stream, lanes, kept_out={"1": 2}), lanes - 1)
    whole = [(ids.tolist(), position) for ids, position in islice(lane.sequences(Position()), 60)]
    assert whole[-1][1].epoch > 0 or lanes == 1
    for number, (_, position) in enumerate(whole[:-2]):
        # As a checkpoint keeps it.
        again = Position(**json.loads(json.dumps(position._asdict())))
        following = [ids.tolist() for ids, _ in islice(lane.sequences(again), 2)]
        assert following == [ids for ids, _ in whole[number + 1 : number + 3]], number
    # A run that is stopped after every sequence: positions of resumed lanes are as good.
    position = Position()
    for number, (expected, _) in enumerate(whole):
        ids, after = next(lane.sequences(position))
        assert ids.tolist() == expected, number
        position = Position(**json.loads(json.dumps(after._asdict())))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_prefetched_is_not_counted(folders: dict[str, Path], tmp_path: Path, workers: int) -> None:
    options = {"lanes": 4, "batch": 8}
    expected, _ = batches(opened(folders["rows"], **options), 40)
    # 4 micro-batches of 2 are a step; the fifth is of a step that is not over, and is given again.
    for count, whole in ((4, 4), (20, 20), (21, 20)):
        ran, loader = batches(opened(folders["rows"], **options), count, workers=workers)
        assert ran == expected[:count]
        loader.save(str(tmp_path))
        resumed = opened(folders["rows"], **options)
        resumed.load(str(tmp_path))
        assert batches(resumed, 12, workers=2 - workers)[0] == expected[whole : whole + 12]


def test_another_number_of_ranks_goes_on_with_the_same_steps(folders: dict[str, Path], tmp_path: Path) -> None:
    def steps(streams: list[LaneStream], count: int) -> tuple[list[list[list[int]]], list[LaneLoader]]:
        pairs = [batches(stream, count, size=8 // len(streams)) for stream in streams]
        together = zip(*(ran for ran, _ in pairs), strict=True)
        return [sorted(chain.from_iterable(parts)) for parts in together], [loader for _, loader in pairs]

    def ranks(world_size: int) -> list[LaneStream]:
        return [
            opened(folders["rows"], lanes=4, batch=8, rank=rank, world_size=world_size) for rank in range(world_size)
        ]

    expected, _ = steps(ranks(1), 9)
    done: list[list[list[int]]] = []
    for number, world_size in enumerate((2, 4, 1)):
        streams = ranks(world_size)
        for stream in streams:
            if number:
                stream.load(str(tmp_path / str(number - 1)))
        ran, loaders = steps(streams, 3)
        done += ran
        (tmp_path / str(number)).mkdir()
        for loader in loaders:
            loader.save(str(tmp_path / str(number)))
    assert done == expected


def test_resuming_reads_nothing_that_is_behind(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folders["rows"].iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    stream = document_stream.from_hub(str(copy), None, "text")["train"]
    lane = Lane(stream, encode, plan(stream, 1), 0)
    whole = [(ids.tolist(), position) for ids, position in islice(lane.sequences(Position()), 90)]
    number = next(n for n, (_, position) in enumerate(whole) if position.turn == 3)
    order = Permutation(len(lane._parts), 3, 0, 0)(np.arange(len(lane._parts)))
    for part in order[:3]:
        (copy / f"{part}.jsonl").write_text("this is no row")
    following = [ids.tolist() for ids, _ in islice(lane.sequences(whole[number][1]), 10)]
    assert following == [ids for ids, _ in whole[number + 1 : number + 11]]


def test_workers_share_lanes_evenly(folders: dict[str, Path]) -> None:
    stream = opened(folders["rows"], lanes=6, batch=6)
    assert [stream.workers(n) for n in (0, 1, 2, 3, 4, 5, 6, 9)] == [0, 1, 2, 3, 3, 3, 6, 6]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 4}, "its seed is 3, here it is 4"),
        ({"source": "there"}, "its source is 'here'"),
        ({"context_length": 9}, "its context_length is 8"),
        ({"tokenizer": "u"}, "its tokenizer is 't'"),
        ({"kept_out": {"0": 1}}, "its kept_out"),
        ({"world_size": 3, "batch": 12, "lanes": 3}, r"4 lanes that cannot be shared by 3 processes .*do: 1, 2, 4\)"),
    ],
)
def test_another_stream_is_refused(folders: dict[str, Path], tmp_path: Path, change: Any, words: str) -> None:
    _, loader = batches(opened(folders["rows"], lanes=4, batch=8), 4)
    loader.save(str(tmp_path))
    resumed = opened(folders["rows"], **{"lanes": 4, "batch": 8, **change})
    with pytest.raises(LaunchError, match=words):
        resumed.load(str(tmp_path))


def test_a_position_that_is_not_whole_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    stream = opened(folders["rows"], lanes=4, batch=8)
    with pytest.raises(LaunchError, match=r"got 0 files .*; allowed: the positions of all lanes"):
        stream.load(str(tmp_path))
    _, loader = batches(opened(folders["rows"], lanes=4, batch=8, rank=1, world_size=2), 2)
    loader.save(str(tmp_path))
    with pytest.raises(LaunchError, match=r"got 1 files .*; allowed: the positions of all lanes"):
        stream.load(str(tmp_path))
    (tmp_path / "data_state_rank0.json").write_text('{"format": 1')
    with pytest.raises(LaunchError, match="is damaged"):
        stream.load(str(tmp_path))


def test_how_many_lanes() -> None:
    def chosen(asked_for: int | None, parts: int, batch: int, world_size: int) -> int:
        return choose_lanes(asked_for, parts=parts, global_batch=batch, world_size=world_size)

    assert [chosen(None, parts, 512, 2) for parts in (1, 5, 8, 1000)] == [2, 4, 8, 64]
    assert (chosen(None, 50, 96, 3), chosen(None, 1000, 512, 128), chosen(16, 1, 32, 4)) == (48, 128, 16)
    for asked_for in (0, 3, 6):
        with pytest.raises(LaunchError, match=f"--stream_lanes: got {asked_for}; allowed: divisors of"):
            chosen(asked_for, 8, 32, 4)


def test_a_lane_without_documents_is_an_error(folders: dict[str, Path]) -> None:
    stream = opened(folders["one"], lanes=50, batch=50, kept_out={"0": 99})
    with pytest.raises(LaunchError, match="has no document to read"):
        batches(stream, 1)


def test_row_groups_are_parts(folders: dict[str, Path]) -> None:
    stream = document_stream.from_hub(str(folders["parquet"]), None, "text")["train"]
    smaller = stream.in_smaller_parts()
    assert (stream.num_parts, smaller.num_parts) == (5, 20)
    assert [[*smaller.texts(n)] for n in (0, 3)] == [["2", "3", "4", "5", "6", "7"], ["20", "21"]]


def test_the_first_documents_are_counted_by_part(folders: dict[str, Path]) -> None:
    stream = document_stream.from_hub(str(folders["rows"]), None, "text")["train"]
    texts, taken = document_stream.first_documents(stream, 25)
    assert (texts, taken) == ([str(n) for n in range(2, 27)], {0: 20, 1: 5})


def test_two_ranks_resume_with_the_same_losses(folders: dict[str, Path], tmp_path: Path) -> None:
    """Both ways of loading, in a Trainer of two ranks: started, stopped, and gone on with by other workers."""
    program = ROOT / "tests" / "launchers" / "exact_loading.py"
    environment = {"PYTHONPATH": str(ROOT / "launchers"), "OMP_WAIT_POLICY": "PASSIVE"}
    run_ranks(program, folders["rows"], tmp_path, timeout=150, env=environment)
    for name, step in (("stream", 4), ("shards", 7)):
        runs = json.loads((tmp_path / f"{name}.json").read_text())
        assert len({loss for _, loss, _, _ in runs["whole"]}) == 9
        assert runs["resumed"] == runs["whole"][step:], name
    assert "was reading other data" in runs["refused"]
