"""Tokenizing texts, and telling tokenizers apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encode = Callable[[list[str]], list[list[int]]]


def encoder(tokenizer: PreTrainedTokenizerBase) -> Encode:
    """Texts to token ids, each document closed by EOS; may be sent to another process."""
    return partial(_encode, tokenizer)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # verbose: a document longer than the model's context is what packing is for.
    batch = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [[*ids, tokenizer.eos_token_id] for ids in batch["input_ids"]]


def rules(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """All that decides which ids a text becomes, as JSON; None for a tokenizer without a `tokenizers` backend."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    # The last call's padding and truncation are in there too.
    kept = {key: value for key, value in json.loads(backend.to_str()).items() if key not in ("padding", "truncation")}
    return json.dumps(kept, sort_keys=True)


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Equal for tokenizers that give every text the same ids, in any process and on any machine."""
    known = rules(tokenizer) or json.dumps([type(tokenizer).__name__, tokenizer.get_vocab()], sort_keys=True)
    special = [tokenizer.eos_token_id, len(tokenizer), getattr(tokenizer, "split_special_tokens", False)]
    return hashlib.sha256(json.dumps([known, special]).encode()).hexdigest()
