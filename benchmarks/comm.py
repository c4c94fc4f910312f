"""`benchmark.py comm`: sums of gradients over ranks in 8 and 4 bits beside torch's, over loopback and slow links."""

from __future__ import annotations

import argparse
import os
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks import comm_contenders, links, timing
from benchmarks.comm_contenders import BASE, PLAIN, Contender
from benchmarks.comm_worker import Measured, Spec
from benchmarks.optimizer import parse_size
from benchmarks.ranks import run_ranks
from benchmarks.slow_link import INTERFACE, Link
from ds_quant.cli.shared.errors import CommandError
from ds_quant.cli.shared.tables import environment, print_table, write_csv

HELP = "time and bytes of all-reduce, reduce-scatter and DDP hooks, over slow links too"

NCCL = "nccl"
"""In place of a link: the GPUs of this machine."""
_START_SECONDS = 120
_SECONDS_PER_ELEMENT = 1e-7
"""Far more than a contender's arithmetic takes: for time-outs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Sums fp32 gradients over ranks, all ways in turns, one process a rank; a call's time is the slowest rank's. "
        "`ratio` is to the fp32 all-reduce in the same round (DDP: to DDP without a hook), median and 20th to 80th "
        "percentile; `x fp32` and `x bf16` say how many times faster than the same collective in 32 and 16 bits "
        "(bf16 rows send bf16 gradients and do not convert). `sent` is what a rank puts on the wire by formula, `read` "
        "what its interface counted. `floor` is the time that those bytes take at the link's rate, over its own time. "
        "`error` is relative to the exact sum. With --device cuda the ranks have a GPU each and talk over NCCL."
    )
    parser.add_argument(
        "--sizes", default="25M", help="elements; k, M, G; rounded up to a multiple of the ranks (default: %(default)s)"
    )
    parser.add_argument("--ranks", type=int, default=2, help="default: %(default)s")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: over NCCL, a GPU a rank (default: %(default)s)"
    )
    links.add_argument(parser)
    parser.add_argument(
        "--only", help="names of contenders that contain one of these, split by commas; bases always run"
    )
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=1, help="rounds before them (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of each rank; default: the cores, divided among the ranks")
    parser.add_argument("--output", default="runs/benchmark/comm.csv", help="default: %(default)s")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure every size over every link, print a table for each, write the CSV."""
    if options.ranks < 2:
        raise CommandError(f"--ranks: got {options.ranks}; allowed: 2 or more, since one has no gradients to sum")
    if options.rounds < 2:
        raise CommandError(f"--rounds: got {options.rounds}; allowed: 2 or more, for a spread; give more")
    sizes = [_elements(text, options.ranks) for text in options.sizes.split(",")]
    chosen = _choose(options.only)
    names = _nccl(options) if options.device == "cuda" else links.choose(options.links)
    threads = options.threads or max(1, (os.cpu_count() or 1) // options.ranks)
    where = {**environment(torch.device(options.device)), "threads": threads}
    print(
        f"{where['processor']}, {options.ranks} ranks of {threads} threads, torch {where['torch']}, {where['commit']}"
    )
    rows: list[dict[str, Any]] = []
    for name in names:
        with nullcontext() if name == NCCL else links.open_link(name, options.ranks) as link:
            for text, numel in zip(options.sizes.split(","), sizes, strict=True):
                measured = _measure(chosen, numel, threads, link, options)
                rows += _report(name, text, numel, chosen, measured, link, options)
    write_csv(Path(options.output), rows, where)
    print(f"written: {options.output}")


def _nccl(options: argparse.Namespace) -> list[str]:
    """The one link of GPUs, by name; CommandError where there are not enough of them, or where links are asked for."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < max(2, options.ranks):
        raise CommandError(
            f"--device: got 'cuda' with {count} GPUs for {options.ranks} ranks; allowed: 2 GPUs or more, one a rank; "
            "give fewer ranks, or --device cpu"
        )
    if options.links is not None:
        raise CommandError(f"--links: got {options.links!r}; allowed with --device cuda: none, NCCL finds its own")
    return [NCCL]


def _elements(text: str, ranks: int) -> int:
    count, numel = parse_size(text)
    if count != 1:
        raise CommandError(f"--sizes: got {text!r}; allowed: elements (25M); write it so")
    return -(-numel // ranks) * ranks


def _choose(only: str | None) -> list[Contender]:
    wanted = [part.strip().lower() for part in only.split(",")] if only else [""]
    everyone = comm_contenders.ALL
    for part in wanted:
        if not any(part in contender.name.lower() for contender in everyone):
            names = "; ".join(contender.name for contender in everyone)
            raise CommandError(f"--only: got {part!r}; allowed: parts of {names}; correct it")
    chosen = {c.name for c in everyone if any(part in c.name.lower() for part in wanted)}
    chosen |= {BASE[c.group] for c in everyone if c.name in chosen}
    return [c for c in everyone if c.name in chosen]


def _measure(
    chosen: list[Contender], numel: int, threads: int, link: Link | None, options: argparse.Namespace
) -> list[Measured]:
    slowest = 4 * 8 * numel / link.bits_per_second * 2 if link else 0.0
    one_call = 60 + 3 * slowest + numel * _SECONDS_PER_ELEMENT
    calls = (options.rounds + options.warm_up + 5) * len(chosen)
    spec = Spec(
        names=[contender.name for contender in chosen],
        numel=numel,
        rounds=options.rounds,
        warm_up=options.warm_up,
        threads=threads,
        interface=INTERFACE if link else None,
        timeout=one_call,
        device=options.device,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = spec.write(Path(folder))
        run_ranks(
            ["-m", "benchmarks.comm_worker", str(path)],
            ranks=options.ranks,
            link=link,
            environment={"OMP_NUM_THREADS": str(threads)},
            timeout=_START_SECONDS + calls * (slowest + 1 + numel * _SECONDS_PER_ELEMENT),
        )
        return [Measured.read(Path(folder), rank) for rank in range(options.ranks)]


def _report(
    name: str,
    text: str,
    numel: int,
    chosen: list[Contender],
    measured: list[Measured],
    link: Link | None,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """The rows of one link and size; prints them."""
    failed = measured[0].failed
    for who, problem in failed.items():
        print(f"left out: {who}: {problem}")
    for base in BASE.values():
        if base in failed:
            raise CommandError(f"{base}: got {failed[base]}; allowed: a baseline that runs; fix that error")
    # A collective is over when the last rank has its result.
    seconds = {
        who: [max(turn) for turn in zip(*(m.seconds[who] for m in measured), strict=True)]
        for who in measured[0].seconds
    }
    ratios = {base: timing.ratios(seconds, base) for base in set(BASE.values()) & seconds.keys()}
    rows = []
    for contender in (c for c in chosen if c.name in seconds):
        took = timing.spread(seconds[contender.name])
        ratio = ratios[BASE[contender.group]][contender.name]
        formula = contender.sent_over_nccl if name == NCCL and contender.sent_over_nccl else contender.sent
        sent = formula(numel, options.ranks)
        # All ranks send alike; the most is what the link has to carry.
        read = max((m.sent[contender.name] or 0 for m in measured), default=0) if link else None
        fp32, bf16 = (_times_faster(seconds, contender.name, other) for other in PLAIN[contender.group])
        rows.append(
            {
                "link": name,
                "ranks": options.ranks,
                "size": text,
                "elements": numel,
                "group": contender.group,
                "contender": contender.name,
                **timing.columns("seconds", took),
                "ratio_to": BASE[contender.group],
                **timing.columns("ratio", ratio),
                "times_faster_than_fp32": fp32,
                "times_faster_than_bf16": bf16,
                "bytes_sent_by_formula": round(sent),
                "bytes_sent_read": read,
                "fraction_of_link_floor": sent * 8 / link.bits_per_second / took.p50 if link else None,
                "relative_error": max(m.errors[contender.name] for m in measured),
                "rounds": options.rounds,
            }
        )
    title = f"{text} fp32 gradients, {options.ranks} ranks, {name}"
    columns = ["contender", "ms", "ratio", "(20%-80%)", "x fp32", "x bf16", "sent MB"]
    columns += ["read MB", "floor", "error"] if link else ["error"]
    print_table(title, columns, [_cells(row, link) for row in rows])
    return rows


def _times_faster(seconds: dict[str, list[float]], name: str, other: str | None) -> float | None:
    if other is None or other not in seconds:
        return None
    return timing.spread([b / a for a, b in zip(seconds[name], seconds[other], strict=True)]).p50


def _cells(row: dict[str, Any], link: Link | None) -> list[str]:
    cells = [
        row["contender"],
        f"{row['seconds_p50'] * 1e3:.1f}",
        f"{row['ratio_p50']:.3f}",
        f"{row['ratio_p20']:.3f}-{row['ratio_p80']:.3f}",
        *(
            "" if row[key] is None else f"{row[key]:.2f}"
            for key in ("times_faster_than_fp32", "times_faster_than_bf16")
        ),
        f"{row['bytes_sent_by_formula'] / 1e6:.2f}",
    ]
    if link:
        cells += [f"{row['bytes_sent_read'] / 1e6:.2f}", f"{row['fraction_of_link_floor']:.0%}"]
    return [*cells, f"{row['relative_error']:.1e}"]
