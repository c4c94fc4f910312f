"""`benchmark.py linear`: forward and backward of one linear layer in int8 beside bf16, and beside bare products."""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import charts, choices, device_timing, held, linear_contenders, recipes, timing
from benchmarks.linear_contenders import BASE, CEILING, Contender, Layer, Operands
from ds_quant.cli.shared import process_memory
from ds_quant.cli.shared.errors import CommandError
from ds_quant.cli.shared.tables import environment, print_table, write_csv

HELP = "time and saved bytes of one linear layer, forward and backward"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Forward and backward of one linear layer on random X [tokens, in] in bf16 with bf16 parameters, all ways in "
        f"turns; gradients are dropped between calls. `ratio` is to {BASE} in the same round, median and 20th to 80th "
        "percentile, `speed-up` one over it; `matched` is how many times as fast ours is as the fastest peer that has "
        "the same products in 8 bits, the forward's or all three. `ceiling` is the time of the layer's three bare "
        "integer products, by torch._int_mm on codes that are there already, over its own. `saved` is what the layer "
        "holds between forward and backward for the latter, bytes for each element of X; `kept` what it keeps beside "
        "that and its parameters, from step to step; `extra` the peak of memory during a call, gradients included. "
        "Codes of weights "
        "are made again in every call, as after a step of the optimizer. On cuda, times are those of the device, by "
        "replay of a CUDA graph (by events where none can be captured, as a line says); the host's stand beside them. "
        "Competitors: pip install 'ds_quant[bench]'."
    )
    parser.add_argument(
        "--shapes",
        default="768x3072,3072x768,768x768,768x2304,4096x4096",
        help="INxOUT, split by commas (default: %(default)s)",
    )
    parser.add_argument("--tokens", type=int, default=2048, help="rows of X (default: %(default)s)")
    parser.add_argument("--bias", action="store_true", help="with a bias")
    parser.add_argument("--backend", choices=recipes.BACKENDS, default="int8", help="ours' (default: %(default)s)")
    choices.add_common(parser, rounds=15, warm_up=3, output="runs/benchmark/linear.csv", iterations=10)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure every shape, print a table for each, write the CSV and the picture."""
    shapes = [_parse_shape(text) for text in options.shapes.split(",")]
    # torch._int_mm on GPUs takes no fewer rows.
    choices.at_least("--tokens", options.tokens, 17)
    device = choices.check_common(options)
    torch.set_num_threads(options.threads)
    chosen = choices.choose(linear_contenders.contenders(options.backend, device), options.only, BASE)
    where = environment(device)
    print(f"{where['processor']}, {where['threads']} threads, torch {where['torch']}, {where['commit']}")
    rows: list[dict[str, Any]] = []
    for text, (in_features, out_features) in zip(options.shapes.split(","), shapes, strict=True):
        operands = Operands.draw(options.tokens, in_features, out_features, bias=options.bias, device=device)
        rows += _measure(text.strip(), operands, chosen, options, device)
    output = Path(options.output)
    write_csv(output, rows, where)
    print(f"written: {output}")
    title = f"linear, forward and backward, {options.tokens} tokens ({where['processor']})"
    charts.draw_speed_ups(output.with_suffix(".png"), title, rows, "shape", BASE)


def _parse_shape(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text.strip())
    # torch._int_mm on GPUs takes multiples of 8 alone: what is measured here can be measured there.
    if not match or any(int(n) < 8 or int(n) % 8 for n in match.groups()):
        raise CommandError(f"--shapes: got {text!r}; allowed: INxOUT (768x3072), multiples of 8; write it so")
    return int(match[1]), int(match[2])


def _measure(
    text: str, operands: Operands, chosen: list[Contender], options: argparse.Namespace, device: torch.device
) -> list[dict[str, Any]]:
    # What was compiled for other shapes would count against torch's limit of recompilations.
    torch.compiler.reset()
    layers: dict[str, Layer] = {}

    def prepare(contender: Contender) -> None:
        layer = contender.make(operands)
        layer.forward_backward()
        layers[contender.name] = layer

    for contender in chosen:
        choices.attempt(contender.name, BASE, functools.partial(prepare, contender))
    calls: dict[str, Callable[[], object]] = {name: layer.forward_backward for name, layer in layers.items()}
    raw = linear_contenders.raw_products(operands)
    if choices.attempt(CEILING, BASE, raw):
        calls[CEILING] = raw

    def clear(name: str) -> None:
        if name in layers:
            layers[name].clear()

    seconds, columns = device_timing.seconds_and_columns(
        calls,
        rounds=options.rounds,
        warm_up=options.warm_up,
        device=device,
        before=clear,
        graphs=True,
        iterations=options.iterations,
    )
    ratios = timing.ratios(seconds, BASE)
    to_ceiling = timing.ratios(seconds, CEILING) if CEILING in seconds else {}
    matched = linear_contenders.matched_speed_ups(seconds, chosen)
    products = {contender.name: contender.products for contender in chosen}
    rows = []
    for name, call in calls.items():
        layer = layers.get(name)
        took, ratio = timing.spread(seconds[name]), ratios[name]
        saved = held.held_bytes(layer.module, layer.forward) if layer else None
        clear(name)
        rows.append(
            {
                "shape": text,
                "tokens": options.tokens,
                "bias": options.bias,
                "backend": options.backend,
                "contender": name,
                **timing.columns("seconds", took),
                **timing.columns("ratio", ratio),
                "speed_up": 1 / ratio.p50,
                "products_in_8_bits": products.get(name),
                "matched_speed_up": matched.get(name),
                "share_of_ceiling": 1 / to_ceiling[name].p50 if name in to_ceiling else None,
                "saved_bytes": saved and saved.saved,
                "saved_bytes_per_element": saved and saved.saved / operands.x.numel(),
                "kept_bytes": saved and saved.kept,
                "peak_extra_bytes": process_memory.peak_bytes(call, device),
                **columns[name],
                "rounds": options.rounds,
            }
        )
        clear(name)
    print_table(
        f"{text}: X [{options.tokens}, in], forward and backward",
        [
            *("contender", "ms", "ratio", "(20%-80%)", "speed-up", "matched", "ceiling"),
            *("saved B/elem.", "kept MB", "extra MB"),
            *device_timing.host_column(device),
        ],
        [_cells(row) + device_timing.host_cell(row) for row in rows],
    )
    return rows


def _cells(row: dict[str, Any]) -> list[str]:
    def maybe(key: str, form: str, factor: float = 1.0) -> str:
        return "" if row[key] is None else format(row[key] * factor, form)

    return [
        row["contender"],
        f"{row['seconds_p50'] * 1e3:.2f}",
        f"{row['ratio_p50']:.3f}",
        f"{row['ratio_p20']:.3f}-{row['ratio_p80']:.3f}",
        f"{row['speed_up']:.2f}",
        maybe("matched_speed_up", ".2f"),
        maybe("share_of_ceiling", ".0%"),
        maybe("saved_bytes_per_element", ".3f"),
        maybe("kept_bytes", ".1f", 1e-6),
        maybe("peak_extra_bytes", ".1f", 1e-6),
    ]
