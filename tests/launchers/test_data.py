from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretraining import data, documents, packing, tokenizer
from pretraining.arguments import DataArguments
from pretraining.errors import LaunchError
from samples import write_corpus
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, TrainingArguments

EOS = 1
FEATURES = datasets.Features({"input_ids": datasets.Sequence(datasets.Value("int32"))})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "documents.jsonl")


class WordStream(torch.utils.data.IterableDataset):
    """A stream of documents whose text is their ids, in another order each epoch."""

    def __init__(self, ids: list[list[int]]) -> None:
        self.ids = ids
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        order = self.ids if self.epoch % 2 == 0 else self.ids[::-1]
        return iter([{"text": json.dumps(ids)} for ids in order])


def encode(texts: list[str]) -> list[list[int]]:
    return [[*json.loads(text), EOS] for text in texts]


@settings(max_examples=60, deadline=None)
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
    stream = packing.PackedStream(WordStream(ids), encode, length, repeat=False)
    assert [t for item in stream for t in item["input_ids"].tolist()] == whole


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


def test_a_repeated_stream_goes_on_across_epochs() -> None:
    stream = packing.PackedStream(WordStream([[2, 3], [4]]), encode, 2)
    items = iter(stream)
    tokens = [t for _ in range(5) for t in next(items)["input_ids"].tolist()]
    assert tokens == [2, 3, EOS, 4, EOS, 4, EOS, 2, 3, EOS]
    assert next(iter(packing.PackedStream(WordStream([]), encode, 2)), None) is None


def test_workers_share_a_stream() -> None:
    ids = [[n, n, n] for n in range(2, 40)]
    alone = [x["input_ids"].tolist() for x in packing.PackedStream(WordStream(ids), encode, 8, repeat=False)]
    stream = packing.PackedStream(WordStream(ids), encode, 8, repeat=False)
    shared = [x["input_ids"][0].tolist() for x in DataLoader(stream, batch_size=1, num_workers=2)]
    assert sorted(shared) == sorted(alone)


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
    files = documents.python_source()
    assert len(files) > 300
    assert files == sorted(files)
    assert not [f for f in files if "/test/" in f or "site-packages" in f]


def test_kinds_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first\n\nsecond line\n")
    (tmp_path / "b.txt").write_text("other")
    (tmp_path / "c.jsonl").write_text('{"body": "row 1"}\n{"body": "row 2"}\n')
    datasets.Dataset.from_dict({"body": ["row 3"], "more": [1]}).to_parquet(tmp_path / "d.parquet")
    read = documents.read_files([str(tmp_path / "*.txt")], "ignored", "--train_file")
    assert list(read["text"]) == ["first\n\nsecond line\n", "other"]
    mixed = [str(tmp_path / "c.jsonl"), str(tmp_path / "d.parquet"), str(tmp_path / "b.txt")]
    assert sorted(documents.read_files(mixed, "body", "--train_file")["text"]) == ["other", "row 1", "row 2", "row 3"]


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
        ("column.jsonl", b'{"body": "a"}\n', "no column 'text'; its columns are: body. Name one with --text_column"),
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
        documents.read_files([str(path)], "text", "--train_file")


def test_a_hub_that_cannot_be_reached_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LaunchError, match=r"'nobody/nothing' could not be loaded.*\n.*hub can be reached"):
        documents.load(DataArguments(dataset_name="nobody/nothing"), seed=0)
    with pytest.raises(LaunchError, match="hub can be reached"):
        tokenizer.load("nobody/nothing")


def test_streaming_takes_validation_from_the_start(corpus: Path) -> None:
    args = DataArguments(dataset_name=str(corpus.parent), streaming=True, validation_documents=5)
    first, again = documents.load(args, seed=3), documents.load(args, seed=3)
    kept = [row["text"] for row in first.validation]
    train = [row["text"] for row in first.train]
    assert (len(kept), len(train)) == (5, 35)
    assert not set(kept) & set(train)
    assert train == [row["text"] for row in again.train]
    assert train != sorted(train), "shuffled"


@pytest.fixture(scope="module")
def small_tokenizer(corpus: Path) -> PreTrainedTokenizerFast:
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    return tokenizer.train(texts, vocab_size=320)


def test_tokens_are_cached_for_the_next_rank_and_run(
    corpus: Path, small_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    read = documents.read_files([str(corpus)], "text", "--train_file")
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
    [(0, 1, "training text is shorter than one sequence"), (3, 1, "fewer than the 4"), (8, 0, "validation text is")],
)
def test_text_that_is_too_short(tmp_path: Path, sequences: int, validation: int, words: str) -> None:
    def packed(count: int) -> packing.PackedDataset:
        return packing.PackedDataset(
            datasets.Dataset.from_dict({"input_ids": [[1] * (8 * count + 3)]}, features=FEATURES), 8
        )

    training = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=4)
    with pytest.raises(LaunchError, match=words):
        data._check_lengths(packed(sequences), packed(validation), 8, training)
