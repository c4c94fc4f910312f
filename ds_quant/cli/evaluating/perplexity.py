"""Loss and perplexity of a model on one long text, cut into windows.

Windows of L tokens begin every S tokens. With S = L, the paper's way, they do not overlap and each scores its tokens
but the first, which nothing predicts. With S < L a window scores the tokens that no window before it has, with at
least L - S tokens in front of them. The last window may be shorter; it is scored too, as in the guide of transformers
on perplexity. Unlike there, the number of scored tokens is counted exactly where windows overlap.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ds_quant.cli.evaluating.texts import Tokens
from ds_quant.cli.shared.errors import CommandError


class Window(NamedTuple):
    """Tokens `begin` to `end`, of which the last `scored` count."""

    begin: int
    end: int
    scored: int


@dataclass(frozen=True)
class Perplexity:
    """Figures of one model on one text."""

    loss: float
    """Mean negative log-likelihood of the scored tokens, nats a token."""
    perplexity: float
    """exp(loss)."""
    bits_per_byte: float
    """loss / ln 2 times the tokens a byte of UTF-8: comparable between tokenizers."""
    word_perplexity: float
    """exp(loss times the tokens a word), words being separated by white space: likewise."""
    tokens: int
    """Of the whole text."""
    scored_tokens: int
    windows: int


def windows(num_tokens: int, length: int, stride: int) -> list[Window]:
    """The windows of a text of `num_tokens`, in order; those that score nothing are left out."""
    found = []
    scored_to = 0
    for begin in range(0, num_tokens, stride):
        end = min(begin + length, num_tokens)
        scored = min(end - scored_to, end - begin - 1)
        if scored > 0:
            found.append(Window(begin, end, scored))
        scored_to = end
    return found


def spread(found: list[Window], length: int, count: int | None) -> list[Window]:
    """`count` of the windows of whole length, spread evenly as the validation of pre-training spreads them."""
    if count is None:
        return found
    whole = [window for window in found if window.end - window.begin == length]
    chosen = np.linspace(0, len(whole) - 1, num=min(count, len(whole)), dtype=np.int64)
    return [whole[int(index)] for index in chosen]


@torch.no_grad()
def token_losses(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Negative log-likelihood of each token but the first, in fp32 whatever the model's dtype.

    Args:
        ids: int64 [windows, length].

    Returns:
        fp32 [windows, length - 1], on the CPU.
    """
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1).cpu()


def measure(
    model: PreTrainedModel,
    tokens: Tokens,
    *,
    length: int,
    stride: int,
    batch_size: int,
    max_windows: int | None = None,
) -> Perplexity:
    """Score a text.

    Raises:
        CommandError: the text has no token to score, or a batch does not fit into memory.
    """
    chosen = spread(windows(len(tokens.ids), length, stride), length, max_windows)
    if not chosen:
        least = "two tokens" if max_windows is None else f"one whole window of {length}"
        raise CommandError(
            f"{tokens.name}: got {len(tokens.ids)} tokens; allowed: {least} or more; give more text, or a shorter "
            "--context_length"
        )
    total, scored = 0.0, 0
    for batch in _batches(chosen, batch_size):
        ids = torch.stack([tokens.ids[window.begin : window.end] for window in batch])
        losses = _guarded(model, ids.to(model.device), tokens.name, batch_size).double()
        for window, row in zip(batch, losses, strict=True):
            total += float(row[-window.scored :].sum())
            scored += window.scored
    loss = total / scored
    return Perplexity(
        loss=loss,
        perplexity=_exp(loss),
        bits_per_byte=loss / math.log(2) * len(tokens.ids) / tokens.num_bytes,
        word_perplexity=_exp(loss * len(tokens.ids) / max(1, tokens.num_words)),
        tokens=len(tokens.ids),
        scored_tokens=scored,
        windows=len(chosen),
    )


def _batches(chosen: list[Window], batch_size: int) -> Iterator[list[Window]]:
    """Windows of equal length together: nothing is padded."""
    batch: list[Window] = []
    for window in chosen:
        if batch and (len(batch) == batch_size or window.end - window.begin != batch[0].end - batch[0].begin):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _guarded(model: PreTrainedModel, ids: Tensor, name: str, batch_size: int) -> Tensor:
    try:
        return token_losses(model, ids)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # On CPUs it is a RuntimeError of the allocator.
        if isinstance(error, RuntimeError) and "memory" not in str(error).lower():
            raise
        raise CommandError(
            f"{name}: got a batch of {len(ids)} windows of {ids.shape[1]} tokens that does not fit into memory; "
            f"allowed: smaller ones; lower --batch_size ({batch_size}) or --context_length"
        ) from error


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
