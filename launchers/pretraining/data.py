"""Prepares training and validation data as packed sequences."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any, NamedTuple

import datasets
import torch
from corpora import document_stream, packing, shards, streaming
from corpora import tokenizer as tokenizers
from survival.errors import mistake
from transformers import PreTrainedTokenizerBase, TrainingArguments

from ds_quant.cli.shared import terminal, text_files, token_ids
from pretraining import documents
from pretraining.arguments import Arguments


class Data(NamedTuple):
    """Training and validation data as the Trainer reads them, and their tokenizer."""

    train: packing.Packed | streaming.LaneStream
    validation: packing.Packed | packing.EvenSubset
    tokenizer: PreTrainedTokenizerBase


def prepare(args: Arguments, training: TrainingArguments) -> Data:
    """Load, split, tokenize and pack. Raises LaunchError for text that cannot be trained on."""
    if args.data.train_shards is not None:
        prepared = _from_shards(args)
    else:
        # The first process of each machine fills the caches of `datasets`; the others find them filled.
        with training.main_process_first(desc="preparing the data"):
            prepared = _from_stream(args, training) if args.data.streaming else _from_documents(args, training)
    _check_lengths(prepared.train, prepared.validation, args.data.context_length, training)
    limit = args.data.max_eval_sequences
    return prepared if limit is None else prepared._replace(validation=packing.EvenSubset(prepared.validation, limit))


def _from_documents(args: Arguments, training: TrainingArguments) -> Data:
    parts = documents.load(args.data, seed=training.data_seed or 0)
    tokenizer = _tokenizer(args, (row["text"] for row in parts.train))
    length = args.data.context_length
    train = packing.PackedDataset(packing.tokenize(parts.train, tokenizer, what="training"), length)
    validation = packing.PackedDataset(packing.tokenize(parts.validation, tokenizer, what="validation"), length)
    return Data(train, validation, tokenizer)


def _from_shards(args: Arguments) -> Data:
    index = shards.load(str(args.data.train_shards))
    tokenizer = shards.load_tokenizer(index, asked_for=args.model.tokenizer_name)
    train, validation = (
        shards.PackedShards(index, files, args.data.context_length) for files in (index.train, index.validation)
    )
    return Data(train, validation, tokenizer)


def _from_stream(args: Arguments, training: TrainingArguments) -> Data:
    asked, length = args.data, args.data.context_length
    parts = document_stream.from_hub(str(asked.dataset_name), asked.dataset_config_name, asked.text_column)
    stream, global_batch = parts["train"], int(asked.global_batch_size or 1)
    if stream.num_parts < min(global_batch, streaming.MOST_LANES):
        stream = stream.in_smaller_parts()
    kept_out: dict[int, int] = {}
    if asked.validation_file is not None:
        held = text_files.read_files(asked.validation_file, asked.text_column, "--validation_file")
    else:
        if "validation" in parts:
            texts = [text for part in range(parts["validation"].num_parts) for text in parts["validation"].texts(part)]
        else:
            texts, kept_out = document_stream.first_documents(stream, asked.validation_documents)
        held = datasets.Dataset.from_dict({"text": texts})
    every = chain.from_iterable(stream.texts(part, kept_out.get(part, 0)) for part in range(stream.num_parts))
    tokenizer = _tokenizer(args, every)
    lanes = streaming.choose_lanes(
        asked.stream_lanes, parts=stream.num_parts, global_batch=global_batch, world_size=training.world_size
    )
    plan = streaming.Plan(
        source=f"{asked.dataset_name} {asked.dataset_config_name or ''} {asked.text_column}",
        parts=stream.num_parts,
        lanes=lanes,
        context_length=length,
        seed=training.data_seed or 0,
        group=max(1, streaming.SHUFFLED_TOGETHER // lanes),
        kept_out={str(part): count for part, count in kept_out.items()},
        tokenizer=token_ids.fingerprint(tokenizer),
    )
    train = streaming.LaneStream(
        stream,
        token_ids.encoder(tokenizer),
        plan,
        global_batch=global_batch,
        rank=training.process_index,
        world_size=training.world_size,
    )
    if stream.num_parts < lanes:
        terminal.say(
            f"The stream has {stream.num_parts} parts for {lanes} lanes: several lanes read the same part and keep "
            "some of its documents each. More files, or fewer --stream_lanes, would save reading."
        )
    return Data(train, packing.PackedDataset(packing.tokenize(held, tokenizer, what="validation"), length), tokenizer)


def collate(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack sequences of equal length; nothing is padded."""
    return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}


def _tokenizer(args: Arguments, texts: Iterable[str]) -> PreTrainedTokenizerBase:
    model = args.model
    name = model.tokenizer_name or (None if model.vocab_size else model.model_name_or_path or model.config_name)
    if name is not None:
        return tokenizers.load(name)
    if model.vocab_size is None:
        fix = "give --tokenizer_name, or --vocab_size to train one on the text"
        raise mistake("--tokenizer_name", "no tokenizer", "a tokenizer, or the size of one", fix)
    return tokenizers.train(texts, vocab_size=model.vocab_size)


def _check_lengths(train: Any, validation: Any, length: int, training: TrainingArguments) -> None:
    fix = f"give more text, or a shorter --context_length than {length}"
    if isinstance(train, streaming.LaneStream):
        if training.max_steps <= 0:
            got = "none for a stream, whose length is not known"
            raise mistake("--max_steps", got, "the number of steps", "give --max_steps")
    else:
        if len(train) == 0:
            raise mistake("training text", f"{train.num_tokens} tokens", f"at least one sequence of {length}", fix)
        needed = training.per_device_train_batch_size * training.world_size
        if isinstance(train, shards.PackedShards):
            needed *= training.gradient_accumulation_steps  # an epoch is cut to whole global batches
        if len(train) < needed:
            raise mistake(
                "training text",
                f"{len(train)} sequences of {length} tokens",
                f"at least the {needed} that one pass of all processes takes",
                "give more text, a shorter --context_length or a smaller batch",
            )
    if len(validation) == 0:
        fix = f"{fix}, or raise --validation_fraction, or name a --validation_file"
        raise mistake("validation text", f"{validation.num_tokens} tokens", f"at least one sequence of {length}", fix)
