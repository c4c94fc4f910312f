"""Models of runs that have ended, text to train them on, and their loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from corpora import packing, permutation, shards

from studying import protocol
from studying.plan import Key, Settings

SEQUENCES = 256
"""Of the held-out split, as all losses of the study."""
_ORDER = 1000
"""Of the training text, for more steps: of no epoch."""


def load(folder: Path, settings: Settings) -> Any:
    """The model of a run in fp32, its quantizers taken out, for one thread; folder: `model` of the run."""
    import torch

    from ds_quant.cli.shared.loaded_model import load_model

    torch.set_num_threads(1)
    model: Any = load_model(folder, quantizers="off", dtype=torch.float32, device=settings.device).model
    model.config.use_cache = False
    return model


def more_text(key: Key, settings: Settings, steps: int) -> list[dict[str, Any]]:
    """Batches of the training split for so many steps, in an order that no epoch had."""
    import numpy as np

    size = protocol.SIZES[key.size]
    train = shards.PackedShards(settings.index, settings.index.train, size.context_length)
    order = permutation.Permutation(len(train), key.seed, _ORDER)
    places = order(np.arange(steps * size.micro_batch) % len(train))
    return _batches(train, places.tolist(), size.micro_batch, settings.device)


def held_out_text(key: Key, settings: Settings) -> list[dict[str, Any]]:
    """SEQUENCES of the held-out split, spread evenly."""
    size = protocol.SIZES[key.size]
    held_out = shards.PackedShards(settings.index, settings.index.validation, size.context_length)
    even = packing.EvenSubset(held_out, SEQUENCES)
    return _batches(even, range(len(even)), size.micro_batch, settings.device)


def loss(model: Any, text: Sequence[dict[str, Any]]) -> float:
    """In nats a token, over batches that need not be of one size."""
    import torch

    rows = [len(batch["labels"]) for batch in text]
    with torch.no_grad():
        losses = [float(model(**batch).loss) for batch in text]
    return sum(one * count for one, count in zip(losses, rows, strict=True)) / sum(rows)


def _batches(packed: Any, places: Sequence[int], size: int, device: str) -> list[dict[str, Any]]:
    """input_ids and labels, int64 [size, context length] each, of the sequences at `places`."""
    import torch

    rows = [packed[place] for place in places]
    return [
        {name: torch.stack([row[name] for row in rows[at : at + size]]).to(device) for name in ("input_ids", "labels")}
        for at in range(0, len(rows), size)
    ]
