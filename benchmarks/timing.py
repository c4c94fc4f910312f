"""Contenders that take turns: wall-clock seconds of each call, their spread, and the ratio to one of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch


class Spread(NamedTuple):
    """Percentiles of repeated measurements."""

    p20: float
    p50: float
    p80: float


def spread(values: list[float]) -> Spread:
    """The 20th, 50th and 80th percentile of at least two values."""
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return Spread(cuts[1], cuts[4], cuts[7])


def take_turns(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warm_up: int,
    device: torch.device,
    before: Callable[[str], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each call of each contender, `rounds` of them after `warm_up` that do not count.

    Who begins moves on by one from round to round: the first of a round meets another cache than the last. `before` is
    called with the name before each call, outside of its time. `clock` tells seconds.
    """
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warm_up + rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            if before is not None:
                before(name)
            _synchronize(device)
            begin = clock()
            contenders[name]()
            _synchronize(device)
            if number >= warm_up:
                seconds[name].append(clock() - begin)
    return seconds


def ratios(seconds: dict[str, list[float]], base: str) -> dict[str, Spread]:
    """Each contender's seconds over those of `base` in the same round."""
    return {name: spread([a / b for a, b in zip(own, seconds[base], strict=True)]) for name, own in seconds.items()}


def columns(name: str, of: Spread) -> dict[str, float]:
    """Percentiles as columns of a row: NAME_p20, NAME_p50, NAME_p80."""
    return {f"{name}_{percentile}": value for percentile, value in of._asdict().items()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
