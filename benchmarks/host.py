"""`benchmark.py host`: what a call costs the host, apart from the work of a device, beside torch's own calls."""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import choices, host_calls, timing
from ds_quant.cli.shared.errors import CommandError
from ds_quant.cli.shared.tables import environment, print_table, write_csv

HELP = "the host's time of calls, layers, optimizer steps and all-reduces, without a GPU"
_ITERATIONS = {"calls": 50, "layers": 10, "optimizer": 2, "all-reduce": 2}
_MICRO = 1e6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "The thread's time of calls with next to no work, all of a part in turns: operations on a matrix of 16x16, "
        "eager, compiled and launched through our registry; a layer of that size, forward and backward; a step of 148 "
        "small parameters; an all-reduce of 124M elements among ranks that are not there. Ours take the way that they "
        "take on a GPU, without the driver's part of a launch. `ratio` is to torch's own call in the same round, "
        "median and 20th to 80th percentile."
    )
    parts = ",".join(host_calls.PARTS)
    parser.add_argument("--parts", default=parts, help="split by commas (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=8, help="of the all-reduce (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=30, help="measured rounds (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=3, help="rounds before them (default: %(default)s)")
    parser.add_argument("--output", default="runs/benchmark/host.csv", help="default: %(default)s")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure each part, print its table, write the CSV."""
    names = [name.strip() for name in options.parts.split(",")]
    for name in names:
        if name not in host_calls.PARTS:
            raise CommandError(f"--parts: got {name!r}; allowed: {', '.join(host_calls.PARTS)}; correct it")
    for option, least in (("ranks", 2), ("rounds", 2), ("warm_up", 1)):
        choices.at_least(f"--{option.replace('_', '-')}", getattr(options, option), least)
    if importlib.util.find_spec("triton") is None:
        raise CommandError("host: got no package triton; allowed: Linux on x86_64 with triton; pip install triton")
    torch.set_num_threads(1)  # a second thread's time would not be seen
    where = environment(torch.device("cpu"))
    print(f"{where['processor']}, torch {where['torch']}, {where['commit']}; times of the host's thread")
    rows: list[dict[str, Any]] = []
    for name in names:
        with host_calls.PARTS[name](options.ranks) as part:
            rows += _measure(name, part, options)
    write_csv(Path(options.output), rows, where)
    print(f"written: {options.output}")


def _measure(name: str, part: host_calls.Part, options: argparse.Namespace) -> list[dict[str, Any]]:
    iterations = _ITERATIONS[name]
    seconds = timing.take_turns(
        {call: _repeated(function, iterations) for call, function in part.calls.items()},
        rounds=options.rounds,
        warm_up=options.warm_up,
        device=torch.device("cpu"),
        clock=time.thread_time,
    )
    ratios = timing.ratios(seconds, part.base)
    rows = [
        {
            "part": name,
            "call": call,
            **timing.columns("seconds", timing.spread([value / iterations for value in seconds[call]])),
            **timing.columns("ratio", ratios[call]),
            "goal_seconds": part.goals.get(call),
            "rounds": options.rounds,
        }
        for call in part.calls
    ]
    print_table(part.title, ["call", "us", "ratio", "(20%-80%)", "goal, us"], [_cells(row) for row in rows])
    return rows


def _repeated(function: Callable[[], object], times: int) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(times):
            function()

    return repeated


def _cells(row: dict[str, Any]) -> list[str]:
    goal = row["goal_seconds"]
    return [
        row["call"],
        f"{row['seconds_p50'] * _MICRO:.3g}" if row["seconds_p50"] < 1e-3 else f"{row['seconds_p50'] * _MICRO:.0f}",
        f"{row['ratio_p50']:.2f}",
        f"{row['ratio_p20']:.2f}-{row['ratio_p80']:.2f}",
        "" if goal is None else f"{goal * _MICRO:.0f}",
    ]
