from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT
from corpora import packing, shard_writer, shards, streaming, tokenizer
from corpora.corpus import CorpusArguments
from hypothesis import given
from hypothesis import strategies as st
from pretraining import arguments, data, documents
from pretraining.arguments import DataArguments
from survival.errors import LaunchError
from transformers import PreTrainedTokenizerFast, TrainingArguments

from ds_quant.cli.shared import text_files

EOS = 1
FEATURES = datasets.Features({"input_ids": datasets.Sequence(datasets.Value("int32"))})


@given(st.lists(st.lists(st.integers(2, 99), max_size=30), min_size=1, max_size=12), st.integers(2, 17), st.data())
def test_packing_loses_nothing_but_the_tail(ids: list[list[int]], length: int, draw: st.DataObject) -> None:
    flat = [token for document in ids for token in [*document, EOS]]
    whole = flat[: len(flat) // length * length]
    # Several Arrow chunks: sequences must run across their borders.
    cut = draw.draw(st.integers(0, len(ids)))
    parts = [[[*d, EOS] for d in part] for part in (ids[:cut], ids[cut:]) if part]
    tables = [datasets.Dataset.from_dict({"input_ids": part}, features=FEATURES) for part in parts]
    packed = packing.PackedDataset(datasets.concatenate_datasets(tables), length)
    assert packed.num_tokens == len(flat)
    assert [t for i in range(len(packed)) for t in packed[i]["input_ids"].tolist()] == whole


def test_a_sequence_as_the_model_takes_it() -> None:
    packed = packing.PackedDataset(datasets.Dataset.from_dict({"input_ids": [[5, 6, 7, 8]]}, features=FEATURES), 2)
    item = packed[1]
    assert item["input_ids"].tolist() == item["labels"].tolist() == [7, 8]
    assert item["input_ids"].dtype == torch.int64
    with pytest.raises(IndexError):
        packed[2]


def test_packing_copies_no_corpus() -> None:
    tokens = datasets.Dataset.from_dict({"input_ids": [list(range(100))] * 10}, features=FEATURES)
    packed = packing.PackedDataset(tokens, 8)
    assert all(not flat.flags.owndata and not flat.flags.writeable for flat in packed._flat)


def test_packing_follows_a_selection_of_rows() -> None:
    tokens = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3, 4], [5, 6]]}, features=FEATURES)
    packed = packing.PackedDataset(tokens.select([2, 0]), 2)
    assert [packed[i]["input_ids"].tolist() for i in range(len(packed))] == [[5, 6], [1, 2]]


def test_evaluation_sequences_are_fixed_and_spread() -> None:
    tokens = datasets.Dataset.from_dict({"input_ids": [list(range(100))]}, features=FEATURES)
    packed = packing.PackedDataset(tokens, 5)
    assert packing.EvenSubset(packed, 4).indices.tolist() == [0, 6, 12, 19]
    assert packing.EvenSubset(packed, 4)[3]["input_ids"].tolist() == packed[19]["input_ids"].tolist()
    assert len(packing.EvenSubset(packed, 1000)) == len(packed) == 20


def test_documents_are_split_and_never_shared(corpus: Path) -> None:
    args = DataArguments(train_file=[str(corpus)], validation_fraction=0.2)
    first, again, other = (documents.load(args, seed=seed) for seed in (1, 1, 2))
    train, validation = set(first.train["text"]), set(first.validation["text"])
    assert (len(train), len(validation)) == (32, 8)
    assert not train & validation
    assert list(again.validation["text"]) == list(first.validation["text"])
    assert list(other.validation["text"]) != list(first.validation["text"])


def test_the_python_source_is_split_by_file_and_has_no_tests_in_it() -> None:
    files = text_files.python_source()
    assert len(files) > 300
    assert files == sorted(files)
    assert not [f for f in files if "/test/" in f or "site-packages" in f]


def test_kinds_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first\n\nsecond line\n")
    (tmp_path / "b.txt").write_text("other")
    (tmp_path / "c.jsonl").write_text('{"body": "row 1"}\n{"body": "row 2"}\n')
    datasets.Dataset.from_dict({"body": ["row 3"], "more": [1]}).to_parquet(tmp_path / "d.parquet")
    read = text_files.read_files([str(tmp_path / "*.txt")], "ignored", "--train_file")
    assert list(read["text"]) == ["first\n\nsecond line\n", "other"]
    mixed = [str(tmp_path / "c.jsonl"), str(tmp_path / "d.parquet"), str(tmp_path / "b.txt")]
    assert sorted(text_files.read_files(mixed, "body", "--train_file")["text"]) == ["other", "row 1", "row 2", "row 3"]


def test_one_long_file_gives_its_end_to_validation(tmp_path: Path) -> None:
    text = "0123456789" * 10
    (tmp_path / "book.txt").write_text(text)
    parts = documents.load(DataArguments(train_file=[str(tmp_path / "book.txt")], validation_fraction=0.1), seed=0)
    assert (parts.train[0]["text"], parts.validation[0]["text"]) == (text[:90], text[90:])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.txt", None, "there is no such file"),
        ("empty.txt", b"", "is empty"),
        ("data.csv", b"a,b", "unknown kind of file"),
        ("latin.txt", b"caf\xe9", "not UTF-8 text .byte 3"),
        ("broken.jsonl", b'{"text": "a"\nnot json', "cannot be read as json"),
        ("broken.parquet", b"PAR1 no", "cannot be read as parquet"),
        (
            "column.jsonl",
            b'{"body": "a"}\n',
            "no column 'text'; allowed: its columns, body; fix: name one",
        ),
        ("folder", None, "is a folder"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(LaunchError, match=words):
        text_files.read_files([str(path)], "text", "--train_file")


def test_a_hub_that_cannot_be_reached_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LaunchError, match=r"nobody/nothing: got a data set that .*hub can be reached"):
        documents.load(DataArguments(dataset_name="nobody/nothing"), seed=0)
    with pytest.raises(LaunchError, match="hub can be reached"):
        tokenizer.load("nobody/nothing")


@pytest.fixture(scope="module")
def small_tokenizer(corpus: Path) -> PreTrainedTokenizerFast:
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    return tokenizer.train(texts, vocab_size=320)


def test_tokens_are_cached_for_the_next_rank_and_run(
    corpus: Path, small_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    read = text_files.read_files([str(corpus)], "text", "--train_file")
    first = packing.tokenize(read, small_tokenizer, what="training")
    # The same tokenizer in another process: another object, in another state.
    small_tokenizer.save_pretrained(tmp_path)
    other = tokenizer.load(str(tmp_path))
    other(["one", "another text"], padding=True, truncation=True, max_length=3)
    second = packing.tokenize(read, other, what="training")
    assert first.cache_files == second.cache_files != []
    assert small_tokenizer.decode(first[0]["input_ids"][:-1]) == read[0]["text"]
    assert first[0]["input_ids"][-1] == small_tokenizer.eos_token_id
    assert EOS not in np.concatenate([row["input_ids"][:-1] for row in first])


@pytest.mark.parametrize(
    ("sequences", "validation", "words"),
    [
        (0, 1, "training text: got .* tokens; allowed: at least one sequence"),
        (3, 1, "got 3 sequences of 8 tokens; allowed: at least the 4"),
        (8, 0, "validation text: got"),
    ],
)
def test_text_that_is_too_short(tmp_path: Path, sequences: int, validation: int, words: str) -> None:
    def packed(count: int) -> packing.PackedDataset:
        return packing.PackedDataset(
            datasets.Dataset.from_dict({"input_ids": [[1] * (8 * count + 3)]}, features=FEATURES), 8
        )

    training = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=4)
    with pytest.raises(LaunchError, match=words):
        data._check_lengths(packed(sequences), packed(validation), 8, training)


def prepared(tmp_path: Path, *argv: object, batch: int = 4) -> tuple[data.Data, TrainingArguments]:
    config = ["--deepspeed", str(ROOT / "ds_configs" / "baseline.json")]
    batches = ["--context_length", "32", "--global_batch_size", str(batch), "--max_steps", "5"]
    args, _ = arguments.parse([*config, *batches, *map(str, argv)], world_size=1)
    size = args.training["per_device_train_batch_size"]
    training = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, max_steps=5, per_device_train_batch_size=size, data_seed=1
    )
    return data.prepare(args, training), training


@pytest.fixture(scope="module")
def tokens(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    values = {"vocab_size": 320, "validation_documents": 5, "shard_tokens": 5000}
    shard_writer.write(CorpusArguments(output_dir=str(folder), train_file=[str(corpus)], **values))
    return folder


def test_shards_bring_all_that_training_needs(tokens: Path, tmp_path: Path) -> None:
    ready, _ = prepared(tmp_path, "--train_shards", tokens, "--preset", "paper", "--max_eval_sequences", 3)
    index = shards.load(str(tokens))
    assert isinstance(ready.train, shards.PackedShards)
    assert ready.train.num_tokens == sum(file.tokens for file in index.train)
    assert len(ready.tokenizer) == index.vocab_size < 400
    assert len(ready.validation) == 3
    with pytest.raises(LaunchError, match="at least the 4096"):
        prepared(tmp_path, "--train_shards", tokens, "--per_device_train_batch_size", 4096, batch=4096)


@pytest.mark.parametrize(
    "flags",
    [("--train_file", "a.txt"), ("--streaming", "true"), ("--vocab_size", "300"), ("--validation_file", "a.txt")],
)
def test_shards_leave_no_room_for_other_text(tokens: Path, tmp_path: Path, flags: tuple[str, str]) -> None:
    with pytest.raises(LaunchError, match=f"{flags[0]}: got .* beside --train_shards.*leave {flags[0]} out"):
        prepared(tmp_path, "--train_shards", tokens, *flags)


def test_a_stream_keeps_its_first_documents_for_validation(corpus: Path, tmp_path: Path) -> None:
    flags = ["--dataset_name", corpus.parent, "--streaming", "true", "--vocab_size", "320"]
    ready, training = prepared(tmp_path, *flags, "--validation_documents", 5, "--stream_lanes", 2)
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    assert isinstance(ready.train, streaming.LaneStream)
    assert (ready.train.plan.lanes, ready.train.plan.kept_out) == (2, {"0": 5})
    held = [ready.validation[n]["input_ids"].tolist() for n in range(len(ready.validation))]
    assert ready.tokenizer.decode(held[0]) == ready.tokenizer.decode(ready.tokenizer.encode(texts[0])[:32])
    lanes = [streaming.Lane(ready.train._stream, ready.train._encode, ready.train.plan, n) for n in (0, 1)]
    # The 35 others: the first lane has one more of them.
    seen = [
        ready.tokenizer.decode(ids[:-1])
        for lane, count in zip(lanes, (18, 17), strict=True)
        for _, ids in islice(lane._documents(streaming.Position()), count)
    ]
    assert sorted(seen) == sorted(texts[5:])
    with pytest.raises(LaunchError, match="give --max_steps"):
        data._check_lengths(ready.train, ready.validation, 32, training.set_training(num_epochs=1))
    with pytest.raises(LaunchError, match="--stream_lanes: got 2; allowed: lanes for --streaming"):
        prepared(tmp_path, "--train_file", corpus, "--stream_lanes", 2)
