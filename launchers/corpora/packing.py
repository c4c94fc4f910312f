"""Packs documents into sequences: each document ends with EOS; all are concatenated and cut to the context length.

Nothing is repeated, and only the last incomplete sequence is lost. Labels equal the inputs; the models shift them.
"""

from __future__ import annotations

from collections.abc import Iterable

import datasets
import numpy as np
import torch
from datasets.fingerprint import Hasher
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ds_quant.cli.shared.token_ids import encoder, rules


def tokenize(documents: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, *, what: str) -> datasets.Dataset:
    """The documents as token ids in Arrow, cached by `datasets`."""
    encode = encoder(tokenizer)
    return documents.map(
        lambda batch: {"input_ids": encode(batch["text"])},
        # A pickled tokenizer changes with use, so its hash would miss the cache on the next run and the next rank.
        new_fingerprint=_fingerprint(documents, tokenizer),
        batched=True,
        remove_columns=documents.column_names,
        features=datasets.Features({"input_ids": datasets.Sequence(datasets.Value("int32"))}),
        desc=f"Tokenizing the {what} documents",
    )


def _fingerprint(documents: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> str | None:
    text = rules(tokenizer)
    if text is None:
        return None
    special = (tokenizer.eos_token_id, getattr(tokenizer, "split_special_tokens", False))
    return Hasher.hash(("tokens", documents._fingerprint, text, special))


def example(tokens: np.ndarray) -> dict[str, torch.Tensor]:
    """One training sequence in the form that the model takes."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    return {"input_ids": ids, "labels": ids.clone()}


class Packed(Dataset[dict[str, torch.Tensor]]):
    """Sequence i is tokens i*context to (i+1)*context of the concatenated pieces of text.

    Args:
        sizes: number of tokens in each piece.
        context_length: number of tokens in a sequence.
    """

    def __init__(self, sizes: Iterable[int], context_length: int) -> None:
        self._starts = np.cumsum([0, *sizes], dtype=np.int64)
        self.context_length = context_length

    def _tokens(self, number: int) -> np.ndarray:
        """The ids of one piece, not copied."""
        raise NotImplementedError

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all documents, including the incomplete tail."""
        return int(self._starts[-1])

    def __len__(self) -> int:
        return self.num_tokens // self.context_length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        begin = index * self.context_length
        end = begin + self.context_length
        number = int(np.searchsorted(self._starts, begin, side="right")) - 1
        parts = []
        while begin < end:
            offset = begin - int(self._starts[number])
            parts.append(self._tokens(number)[offset : offset + end - begin])
            begin += len(parts[-1])
            number += 1
        return example(np.concatenate(parts))


class PackedDataset(Packed):
    """The documents of a tokenized data set.

    The tokens stay in the memory-mapped Arrow file; only the requested sequence is copied.
    """

    def __init__(self, tokenized: datasets.Dataset, context_length: int) -> None:
        if getattr(tokenized, "_indices", None) is not None:
            # A shuffled or selected data set is a list of row numbers over Arrow; the flat view needs the rows.
            tokenized = tokenized.flatten_indices()
        self._tokenized = tokenized  # keeps the memory map alive
        chunks = tokenized.data.column("input_ids").chunks
        self._flat = [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in chunks if len(chunk)]
        super().__init__(map(len, self._flat), context_length)

    def _tokens(self, number: int) -> np.ndarray:
        tokens: np.ndarray = self._flat[number]
        return tokens


class EvenSubset(Dataset[dict[str, torch.Tensor]]):
    """`count` sequences spread evenly over `packed`, the same at every evaluation."""

    def __init__(self, packed: Packed | EvenSubset, count: int) -> None:
        self._packed = packed
        self.indices = np.linspace(0, len(packed) - 1, num=min(count, len(packed)), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self._packed[int(self.indices[index])]
