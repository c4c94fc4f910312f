"""From arguments to data sets of packed sequences, prepared by the first process of each machine."""

from __future__ import annotations

from typing import Any, NamedTuple

import datasets
import torch
from transformers import PreTrainedTokenizerBase, TrainingArguments

from pretraining import documents, packing
from pretraining import tokenizer as tokenizers
from pretraining.arguments import Arguments
from pretraining.errors import LaunchError


class Data(NamedTuple):
    """What the Trainer reads."""

    train: packing.PackedDataset | packing.PackedStream
    validation: packing.PackedDataset | packing.EvenSubset
    tokenizer: PreTrainedTokenizerBase


def prepare(args: Arguments, training: TrainingArguments) -> Data:
    """Load, split, tokenize and pack; raises LaunchError for text that cannot be trained on."""
    # The first process fills the caches of `datasets`; the others find them filled.
    with training.main_process_first(desc="preparing the data"):
        parts = documents.load(args.data, seed=training.data_seed or 0)
        tokenizer = _tokenizer(args, parts.train)
        length = args.data.context_length
        if args.data.streaming:
            train: Any = packing.PackedStream(parts.train, packing.encoder(tokenizer), length)
            rows = [row["text"] for row in parts.validation]
            parts = parts._replace(validation=datasets.Dataset.from_dict({"text": rows}))
        else:
            train = packing.PackedDataset(packing.tokenize(parts.train, tokenizer, what="training"), length)
        validation = packing.PackedDataset(packing.tokenize(parts.validation, tokenizer, what="validation"), length)
    _check_lengths(train, validation, length, training)
    limit = args.data.max_eval_sequences
    return Data(train, validation if limit is None else packing.EvenSubset(validation, limit), tokenizer)


def collate(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack sequences of equal length; nothing is padded."""
    return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}


def _tokenizer(args: Arguments, train: Any) -> PreTrainedTokenizerBase:
    model = args.model
    name = model.tokenizer_name or (None if model.vocab_size else model.model_name_or_path or model.config_name)
    if name is not None:
        return tokenizers.load(name)
    if model.vocab_size is None:
        raise LaunchError("There is no tokenizer: give --tokenizer_name, or --vocab_size to train one on the text.")
    return tokenizers.train((row["text"] for row in train), vocab_size=model.vocab_size)


def _check_lengths(train: Any, validation: packing.PackedDataset, length: int, training: TrainingArguments) -> None:
    remedy = f"Give more text, or a shorter --context_length than {length}."
    if isinstance(train, packing.PackedStream):
        if next(iter(train), None) is None:
            raise LaunchError(f"The stream holds less than one sequence of {length} tokens. {remedy}")
        if training.max_steps <= 0:
            raise LaunchError("A stream has no known length: give --max_steps.")
    else:
        if len(train) == 0:
            raise LaunchError(
                f"The training text is shorter than one sequence: {train.num_tokens} of {length} tokens. {remedy}"
            )
        needed = training.per_device_train_batch_size * training.world_size
        if len(train) < needed:
            raise LaunchError(
                f"The training text has {len(train)} sequences of {length} tokens, fewer than the {needed} that one "
                f"pass of all processes takes. Give more text, a shorter --context_length or a smaller batch."
            )
    if len(validation) == 0:
        raise LaunchError(
            f"The validation text is shorter than one sequence: {validation.num_tokens} of {length} tokens. "
            f"{remedy} Or raise --validation_fraction, or name a --validation_file."
        )
