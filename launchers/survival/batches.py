"""Divides a global batch over devices and accumulation steps."""

from __future__ import annotations

from typing import Any

from survival.errors import LaunchError


def resolve(values: dict[str, Any], *, explicit: frozenset[str], world_size: int) -> None:
    """Fill `per_device_train_batch_size` and `gradient_accumulation_steps` in `values` from the global batch.

    Sizes that the user gave are kept; a preset's size per device is an upper limit.
    """
    total = values.get("global_batch_size")
    per_device, accumulation = "per_device_train_batch_size", "gradient_accumulation_steps"
    if total is None or ("global_batch_size" not in explicit and {per_device, accumulation} <= explicit):
        total = values.get(per_device, 8) * values.get(accumulation, 1) * world_size
        values["global_batch_size"] = total
        return
    if total < 1 or total % world_size:
        raise LaunchError(
            f"A global batch of {total} sequences cannot be divided among {world_size} processes. "
            f"{_sizes(total)}Give a --global_batch_size that is a multiple of {world_size}."
        )
    per_rank = total // world_size
    if accumulation in explicit:
        steps = values[accumulation]
        size = values[per_device] if per_device in explicit else max(per_rank // max(steps, 1), 1)
    elif per_device in explicit:
        size = values[per_device]
        steps = max(per_rank // max(size, 1), 1)
    else:
        limit = min(values.get(per_device, 8), per_rank)
        size = next(n for n in range(limit, 0, -1) if per_rank % n == 0)
        steps = per_rank // size
    if size * steps != per_rank:
        raise LaunchError(
            f"A global batch of {total} sequences is {per_rank} for each of {world_size} processes, which "
            f"--per_device_train_batch_size {size} times --gradient_accumulation_steps {steps} does not make. "
            "Change one of the three."
        )
    values[per_device], values[accumulation] = size, steps


def _sizes(total: int) -> str:
    """A sentence with the numbers of processes that divide the batch."""
    divisors = [str(n) for n in range(1, total + 1) if total % n == 0]
    if not divisors:
        return ""
    return f"It can be among {', '.join(divisors[:-1])} or {divisors[-1]}. " if len(divisors) > 1 else ""
