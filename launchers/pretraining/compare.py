"""Compares two runs: `python launchers/pretraining/compare.py RUN_A RUN_B [--output PNG]`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ds_quant.cli.shared.run_folder import read_metrics

if not __package__:
    # When run as a script, Python looks for modules next to this file; the package is one folder up.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from survival.errors import LaunchError, mistake

from pretraining import plots


def load(run: Path) -> tuple[plots.Rows, dict[str, Any]]:
    """metrics.csv and summary.json of a run's folder."""
    try:
        rows = read_metrics(run / "metrics.csv")
        summary = json.loads((run / "summary.json").read_text())
    except (OSError, ValueError) as error:
        got, allowed = f"not the folder of a finished run ({error})", "a folder with metrics.csv and summary.json"
        raise mistake(str(run), got, allowed, "name another, or let the run end") from error
    return rows, summary


def gap(first: plots.Rows, second: plots.Rows) -> tuple[list[float], list[float]]:
    """Validation loss of `second` minus `first` at the steps where both were measured."""
    a, b = (dict(zip(*plots.series(rows, "eval_loss"), strict=True)) for rows in (first, second))
    steps = sorted(a.keys() & b.keys())
    return steps, [b[step] - a[step] for step in steps]


def main(argv: list[str] | None = None) -> int:
    """Print the final losses and the gap between them, and draw both curves."""
    parser = argparse.ArgumentParser(description="Compare the validation losses of two runs.")
    parser.add_argument("run_a", type=Path)
    parser.add_argument("run_b", type=Path)
    parser.add_argument("--output", type=Path, default=Path("compare.png"), help="the plot (default: compare.png)")
    args = parser.parse_args(argv)
    try:
        (rows_a, summary_a), (rows_b, summary_b) = load(args.run_a), load(args.run_b)
        steps, gaps = gap(rows_a, rows_b)
        if not steps:
            got, fix = "no step at which both were evaluated", "compare runs with the same --eval_steps"
            raise mistake(f"{args.run_a} and {args.run_b}", got, "one or more", fix)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for key in ("seed", "tokens", "vocab_size"):
        if summary_a.get(key) != summary_b.get(key):
            print(f"note: {key} differs: {summary_a.get(key)} and {summary_b.get(key)}")
    width = max(len(str(args.run_a)), len(str(args.run_b)))
    for run, summary in ((args.run_a, summary_a), (args.run_b, summary_b)):
        print(f"{run!s:{width}}  final validation loss {summary['final_eval_loss']:.4f}")
    final = summary_b["final_eval_loss"] - summary_a["final_eval_loss"]
    print(f"{'gap':{width}}  {final:+.4f} nats (largest on the way: {max(gaps, key=abs):+.4f})")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    names = [str(args.run_a), str(args.run_b)]
    if names[0] == names[1]:
        names[1] += " (again)"
    if plots.draw_comparison({names[0]: rows_a, names[1]: rows_b}, (steps, gaps), args.output):
        print(f"drawn: {args.output}")
    else:
        print("no picture: matplotlib is missing (pip install 'ds_quant[plot]')")
    return 0


if __name__ == "__main__":
    sys.exit(main())
