"""Ranks agree before they talk: a message that is read by another layout than it was written by is silent nonsense."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import torch

from ds_quant.base.errors import ConfigError
from ds_quant.comm import backend


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
        f"rank {rank} of {len(said)}; allowed: the same on all ranks; fix: give every rank the same config, model "
        "and calls"
    )


def raise_together(action: Callable[[], Any], device: torch.device) -> None:
    """Run `action` on every rank; where it fails on one, all ranks raise rather than wait for it in a collective.

    device: where the ranks' collectives run.
    """
    error: Exception | None = None
    try:
        action()
    except Exception as raised:  # whatever it is, the others must learn of it
        error = raised
    failed = torch.tensor([0.0 if error is None else 1.0 + torch.distributed.get_rank()], device=device)
    torch.distributed.all_reduce(failed, op=torch.distributed.ReduceOp.MAX)
    if error is not None or failed.item():
        rank = int(failed.item()) - 1
        said = [str(error)]
        torch.distributed.broadcast_object_list(said, src=rank)
        raise error or ConfigError(f"rank {rank}: {said[0]}")
