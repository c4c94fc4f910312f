"""`diagnose memory`: the peak of a real training step, split by what holds it; and held against the prediction."""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from ds_quant.base.whole_folder import write_json
from ds_quant.cli.diagnosing.memory_chart import PARTS, draw
from ds_quant.cli.shared.errors import CommandError
from ds_quant.cli.shared.ranks import RanksError, run_ranks
from ds_quant.cli.shared.tables import environment, need_rich, print_table, write_csv
from ds_quant.planning.configs import job_config
from ds_quant.planning.job import Job, Outcome
from ds_quant.planning.models import WAYS, resolve_model
from ds_quant.planning.predict import Predictor, read_outcome

HELP = "the peak of a real training step, split by what holds it"
MAX_RANKS = 4
STAGES = (0, 1, 2, 3)
TOLERANCE = 0.05
"""Of a predicted peak, relative to the allocator's."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A job to be measured, and what it is called in tables."""

    model: str
    config: str
    stage: int
    job: Job


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--configs", required=True, help="DeepSpeed JSONs: A.json,B.json")
    parser.add_argument(
        "--models", default="tiny", help=f"names with ':' between them; each {WAYS}. Default: %(default)s"
    )
    parser.add_argument("--stages", help="ZeRO stages, as 0,1,2,3; the config's own without it")
    parser.add_argument("--ranks", default="1", help=f"numbers of ranks, as 1,2,4; {MAX_RANKS} at most")
    parser.add_argument("--micro_batch_size", type=int, default=8, help="sequences of a rank. Default: %(default)s")
    parser.add_argument("--accumulation", type=int, default=1, help="micro steps of a step. Default: %(default)s")
    parser.add_argument("--context_length", type=int, help="tokens of a sequence; a preset's, or all positions")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="recompute activations in the backward")
    parser.add_argument(
        "--reduce_bucket_size",
        type=int,
        help="zero_optimization.reduce_bucket_size, where the JSON has none; DeepSpeed's own, 5e8 elements, hides what "
        "a small model takes",
    )
    parser.add_argument("--table", action="store_true", help="predict every case too, and exit with 1 if one is off")
    parser.add_argument("--output", type=Path, help="a folder for memory.json, memory.csv and memory.png")
    parser.add_argument("--timeout", type=float, default=1200.0, help="seconds for all of one number of ranks")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write. Exit code 1: a prediction is off. Raises CommandError and ConfigError before training."""
    need_rich()
    cases = make_cases(args)
    if args.output is not None:
        if args.output.exists() and not args.output.is_dir():
            raise CommandError(f"--output {args.output}: got a file; allowed: a folder; name another")
        args.output.mkdir(parents=True, exist_ok=True)
    rows = [
        row
        for ranks in sorted({case.job.world_size for case in cases})
        for row in measure([case for case in cases if case.job.world_size == ranks], args.timeout)
    ]
    if args.table:
        with Predictor() as predictor:
            for case, row in zip(sorted(cases, key=lambda case: case.job.world_size), rows, strict=True):
                compare(row, predictor.predict(case.job))
    _print(rows, with_predictions=args.table)
    if args.output is not None:
        _write(args.output, rows)
    return int(args.table and not all(row["is_right"] for row in rows))


def make_cases(args: argparse.Namespace) -> list[Case]:
    """All combinations that are asked for. Raises CommandError or ConfigError for one that makes no sense."""
    if args.micro_batch_size < 1 or args.accumulation < 1:
        raise CommandError("--micro_batch_size, --accumulation: allowed: 1 or more; raise them")
    cases = []
    for ranks in _numbers("--ranks", args.ranks, range(1, MAX_RANKS + 1)):
        for name in args.models.split(":"):
            model, length = resolve_model(name, length=args.context_length)
            for path in args.configs.split(","):
                for stage in _numbers("--stages", args.stages, STAGES) if args.stages else [None]:
                    config = job_config(
                        path,
                        world_size=ranks,
                        rows=args.micro_batch_size,
                        accumulation=args.accumulation,
                        stage=stage,
                    )
                    zero = config.setdefault("zero_optimization", {})
                    if args.reduce_bucket_size is not None:
                        zero.setdefault("reduce_bucket_size", args.reduce_bucket_size)
                    job = Job(config, model, args.micro_batch_size, length, ranks, 0, args.gradient_checkpointing)
                    cases.append(Case(name, Path(path).stem, int(zero.get("stage", 0)), job))
    return cases


def _numbers(where: str, text: str, allowed: Any) -> list[int]:
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) in allowed for word in words):
        raise CommandError(f"{where} {text}: allowed: some of {', '.join(map(str, allowed))}, as 1,2; correct it")
    return list(dict.fromkeys(int(word) for word in words))


def measure(cases: list[Case], timeout: float) -> list[dict[str, Any]]:
    """Train every case, all on the same number of ranks; a row for each, of the rank that took most."""
    ranks = cases[0].job.world_size
    with tempfile.TemporaryDirectory() as folder:
        specification = Path(folder, "spec.json")
        specification.write_text(json.dumps([dataclasses.asdict(case.job) for case in cases]))
        try:
            run_ranks(
                ["-m", "ds_quant.cli.diagnosing.memory_worker", str(specification)],
                ranks=ranks,
                link=None,
                environment={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                timeout=timeout,
            )
        except RanksError as error:
            raise CommandError(str(error)) from error
        measured = [json.loads(Path(folder, f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    rows = []
    for number, case in enumerate(cases):
        found = [rank_rows[number] for rank_rows in measured]
        outcomes = [read_outcome(one["outcome"]) for one in found]
        largest = max(range(ranks), key=lambda rank: found[rank]["allocator_bytes"])
        outcome = outcomes[largest]
        rows.append(
            {
                "model": case.model,
                "parameters": outcome.num_parameters,
                "config": case.config,
                "stage": case.stage,
                "ranks": ranks,
                "rank": largest,
                "peak_bytes": found[largest]["allocator_bytes"],
                "phase": outcome.phase,
                **outcome.parts,
                "role_peaks": found[largest]["role_peaks"],
                "in_kernels": found[largest]["allocator_bytes"] - outcome.peak_bytes,
                "rss_bytes": found[largest]["rss_bytes"],
                "wire_bytes": [sent_bytes(one) for one in outcomes],
                "rank_peaks": [one["allocator_bytes"] for one in found],
                "unseen_bytes": found[largest]["unseen_bytes"],
                "traffic": _traffic(outcomes[0]),
            }
        )
    return rows


def sent_bytes(outcome: Outcome) -> int:
    """What a rank sends in a step, in all collectives."""
    return sum(one.sent for one in outcome.collectives)


def compare(row: dict[str, Any], predicted: Outcome) -> None:
    """Add to a measured row what was predicted of rank 0, and whether it is right.

    "is_right": the peak of every rank is within `TOLERANCE` of it, and the bytes that rank 0 sends are exact, in each
    phase and kind of collective.
    """
    errors = [predicted.peak_bytes / measured - 1 for measured in row["rank_peaks"]]
    worst = max(range(len(errors)), key=lambda rank: abs(errors[rank]))
    row["compared_rank"], row["peak_error"] = worst, errors[worst]
    row["predicted_bytes"] = predicted.peak_bytes
    row["predicted_wire_bytes"] = sent_bytes(predicted)
    row["is_right"] = abs(errors[worst]) <= TOLERANCE and _traffic(predicted) == row["traffic"]


def _traffic(outcome: Outcome) -> dict[str, int]:
    """Bytes that are sent, by phase, operation and dtype. Over gloo, codes of both kinds go as so many sends."""
    found: dict[str, int] = {}
    for one in outcome.collectives:
        are_codes = one.operation == "all-gather" and one.dtype == "uint8"
        operation = "messages" if are_codes or one.operation in ("all-to-all", "send") else one.operation
        key = f"{one.phase} {operation} {one.dtype}"
        found[key] = found.get(key, 0) + one.sent
    return found


def _print(rows: list[dict[str, Any]], with_predictions: bool) -> None:
    if with_predictions:
        columns = ["model", "config", "stage", "ranks", "measured", "predicted", "off", "wire", "predicted"]
        table = [
            [
                *(str(row[name]) for name in ("model", "config", "stage", "ranks")),
                f"{row['rank_peaks'][row['compared_rank']]:,}",
                f"{row['predicted_bytes']:,}",
                f"{row['peak_error']:+.3%}",
                f"{row['wire_bytes'][0]:,}",
                f"{row['predicted_wire_bytes']:,}",
            ]
            for row in rows
        ]
        print_table(
            "bytes at the peak of a step (of the rank that is off most), and sent in it (rank 0)",
            columns,
            table,
        )
        wrong = [row for row in rows if not row["is_right"]]
        print(f"{len(rows) - len(wrong)} of {len(rows)} within {TOLERANCE:.0%} and with exact wire bytes")
        return
    columns = ["config", "model", "stage", "ranks", "peak MB", *PARTS]
    table = [
        [
            *(str(row[name]) for name in ("config", "model", "stage", "ranks")),
            f"{row['peak_bytes'] / 1e6:,.2f}",
            *(f"{row[part] / 1e6:,.2f}" for part in PARTS),
        ]
        for row in rows
    ]
    print_table("megabytes at the peak of a step, of the rank that takes most", columns, table)


def _write(folder: Path, rows: list[dict[str, Any]]) -> None:
    import torch

    where = environment(torch.device("cpu"))
    rows = [{name: value for name, value in row.items() if name != "traffic"} for row in rows]
    write_json(folder / "memory.json", {"environment": where, "rows": rows})
    flat = [{name: value for name, value in row.items() if name != "role_peaks"} for row in rows]
    write_csv(folder / "memory.csv", flat, where)
    draw(folder / "memory.png", rows)
