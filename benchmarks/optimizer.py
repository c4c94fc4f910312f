"""`benchmark.py optimizer`: the step of QuantAdamW beside other AdamWs."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

import torch

from benchmarks import choices, contenders, device_timing, timing
from ds_quant.cli.shared import process_memory
from ds_quant.cli.shared.errors import CommandError
from ds_quant.cli.shared.tables import environment, print_table, write_csv
from ds_quant.kernels.adamw.ops import adamw_

HELP = "time, state and extra memory of an optimizer step"

BANDWIDTH = "x.add_(y)"
BANDWIDTH_BYTES = 12
"""Read x, read y, write x: fp32, an element."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Steps of one fp32 parameter (50M) or of many (2000x1024), all optimizers in turns; those with `master` in "
        "their name have bf16 weights and gradients. `ratio` is to torch's fused AdamW in the same round, median and "
        "20th to 80th percentile. `floor` is the time that the bytes it must move take at the bandwidth of an in-place "
        "addition in the same run, over its own time. On cuda, times are those of the device between events, and the "
        "host's stand beside them. Competitors: pip install 'ds_quant[bench]'."
    )
    parser.add_argument(
        "--sizes", default="1M,10M,50M,2000x1024", help="elements, or COUNTxELEMENTS; k, M, G (default: %(default)s)"
    )
    parser.add_argument(
        "--only", help="names of optimizers that contain one of these, split by commas; fused always runs"
    )
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=3, help="rounds before them (default: %(default)s)")
    choices.add_iterations(parser, 5)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores, %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--output", default="runs/benchmark/optimizer.csv", help="default: %(default)s")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure every size, print a table for each, write the CSV."""
    sizes = [parse_size(text) for text in options.sizes.split(",")]
    if options.rounds < 2:
        raise CommandError(f"--rounds: got {options.rounds}; allowed: 2 or more, for a spread; give more")
    choices.at_least("--iterations", options.iterations, 1)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    chosen = choices.choose(contenders.ALL, options.only, contenders.BASE)
    where = environment(device)
    print(f"{where['processor']}, {where['threads']} threads, torch {where['torch']}, {where['commit']}")
    print(f"QuantAdamW is served by {adamw_.implementation(device)}")
    rows: list[dict[str, Any]] = []
    for text, (count, numel) in zip(options.sizes.split(","), sizes, strict=True):
        rows += _measure(text, count, numel, chosen, options, device)
    write_csv(Path(options.output), rows, where)
    print(f"written: {options.output}")


def parse_size(text: str) -> tuple[int, int]:
    """(number of parameters, elements of each) of "50M" or "2000x1024"; CommandError for anything else.

    With a unit the elements are rounded up to a multiple of 256: torchao keeps others in 32 bits.
    """
    match = re.fullmatch(r"(?:(\d+)x)?(\d+(?:\.\d+)?)([kMG]?)", text.strip())
    if not match or not (count := int(match[1] or 1)) or not (numel := _number(match[2], match[3])):
        raise CommandError(f"--sizes: got {text!r}; allowed: elements (50M), COUNTxELEMENTS (2000x1024); write it so")
    return count, numel


def _number(digits: str, unit: str) -> int:
    if not unit:
        return round(float(digits))
    return -(-round(float(digits) * {"k": 10**3, "M": 10**6, "G": 10**9}[unit]) // 256) * 256


def _measure(
    text: str,
    count: int,
    numel: int,
    chosen: list[contenders.Contender],
    options: argparse.Namespace,
    device: torch.device,
) -> list[dict[str, Any]]:
    grads = [torch.randn(numel, device=device) * 1e-2 for _ in range(count)]
    optimizers = {}
    for contender in chosen:
        params = [torch.nn.Parameter(torch.randn(numel, device=device)) for _ in range(count)]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad  # none of them writes to it
        try:
            optimizer = contender.make(params)
            optimizer.step()
        except Exception as error:  # a competitor that cannot run here must not keep the others from it
            print(f"left out: {contender.name}: {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        optimizers[contender.name] = optimizer
    total = count * numel
    x, y = torch.randn(total, device=device), torch.randn(total, device=device)
    calls: dict[str, Any] = {name: optimizer.step for name, optimizer in optimizers.items()}
    calls[BANDWIDTH] = lambda: x.add_(y)
    seconds, columns = device_timing.seconds_and_columns(
        calls,
        rounds=options.rounds,
        warm_up=options.warm_up,
        device=device,
        graphs=False,
        iterations=options.iterations,
    )
    bandwidth = BANDWIDTH_BYTES * total / timing.spread(seconds[BANDWIDTH]).p50
    ratio = timing.ratios(seconds, contenders.BASE)
    moved = {contender.name: contender.moved for contender in chosen}
    rows = []
    for name, optimizer in optimizers.items():
        state = contenders.state_bytes(optimizer)
        took = timing.spread(seconds[name])
        # Parameters are read and written, gradients read, the state read and written.
        floor = (moved[name] * total + 2 * state) / bandwidth
        rows.append(
            {
                "size": text,
                "optimizer": name,
                **timing.columns("seconds", took),
                **timing.columns("ratio", ratio[name]),
                "state_bytes_per_parameter": state / total,
                "peak_extra_bytes_per_parameter": _per(process_memory.peak_extra_bytes(optimizer.step, device), total),
                "fraction_of_bandwidth_floor": floor / took.p50,
                "bandwidth_bytes_per_second": bandwidth,
                **columns[name],
                "rounds": options.rounds,
            }
        )
    print_table(
        f"{text}: in-place addition at {bandwidth / 1e9:.1f} GB/s",
        [
            *("optimizer", "ms", "ratio", "(20%-80%)", "state B/param", "extra B/param", "floor"),
            *device_timing.host_column(device),
        ],
        [
            [
                row["optimizer"],
                f"{row['seconds_p50'] * 1e3:.2f}",
                f"{row['ratio_p50']:.2f}",
                f"{row['ratio_p20']:.2f}-{row['ratio_p80']:.2f}",
                f"{row['state_bytes_per_parameter']:.3f}",
                "?"
                if row["peak_extra_bytes_per_parameter"] is None
                else f"{row['peak_extra_bytes_per_parameter']:.3f}",
                f"{row['fraction_of_bandwidth_floor']:.0%}",
                *device_timing.host_cell(row),
            ]
            for row in rows
        ],
    )
    return rows


def _per(amount: int | None, total: int) -> float | None:
    return None if amount is None else amount / total
