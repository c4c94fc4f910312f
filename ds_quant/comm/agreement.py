"""Ranks agree before they talk: a message that is read by another layout than it was written by is silent nonsense."""

import hashlib
import json
from typing import Any

import torch

from ds_quant.comm import backend
from ds_quant.errors import ConfigError


def check_agreement(what: str, description: Any, group: backend.Group, device: torch.device) -> None:
    """Raise ConfigError on all ranks unless `description` (JSON values) is the same on all ranks of the group."""
    text = json.dumps(description, sort_keys=True, default=str)
    digests = backend.gather_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), group, device)
    if len(set(digests)) == 1:
        return
    said = backend.gather_objects(text, group)
    rank = next(rank for rank, other in enumerate(said) if other != said[0])
    position = next(
        (i for i, (a, b) in enumerate(zip(said[0], said[rank], strict=False)) if a != b),
        min(len(said[0]), len(said[rank])),
    )
    begin = max(0, position - 40)
    raise ConfigError(
        f"{what}: got ...{said[0][begin : position + 60]!r} on rank 0 and ...{said[rank][begin : position + 60]!r} on "
        f"rank {rank} of {len(said)}; allowed: the same on all ranks; remedy: give every rank the same config, model "
        "and calls"
    )
