"""Collect the runs of launchers/pretrain.py into one table.

    python launchers/collect.py ROOT [ROOT ...] [--baseline baseline] [--expect w8a8=0-4 baseline=1,2,3] [--output DIR]

A run is a folder at or below ROOT that has a summary.json, metrics.csv, status.json or checkpoint-N/. Its config and
seed are:

    .../CONFIG/seed-N/  config CONFIG, seed N
    .../CONFIG-sN/      config CONFIG, seed N
    any other folder    config: the name of its parent folder, or its own name if it is ROOT or directly in ROOT;
                        seed: from its summary.json, otherwise unknown

States of a run:
    done      summary.json has a finite final validation loss, and status.json does not contradict it
    running   status.json says so or is missing, and it or metrics.csv changed in the last --stale-after seconds
    stopped   a signal ended it after a checkpoint; start it again
    diverged  status.json says so, or a loss in metrics.csv or summary.json is NaN or Inf
    failed    it has started and is in no other state
    missing   --expect names it, but it does not exist

The table of runs gives the reason for each run that is stopped, diverged or failed.

Means are over the runs that are done; runs of unknown seed count in means but not in pairs. The command writes
collected.csv (one row per run), collected.md (configs, runs, problems) and curves.png, and prints the table of
configs. Exit code: 0 if every run is done, 1 if one is not, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from collecting import configs, curves, names, runs, table
from rich.markup import escape

from ds_quant.base.whole_folder import write_whole
from ds_quant.cli.shared.errors import CommandError
from ds_quant.cli.shared.tables import print_table


def main(argv: list[str] | None = None) -> int:
    """Collect once; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="collect.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("roots", metavar="ROOT", type=Path, nargs="+", help="folder to search for runs")
    parser.add_argument("--baseline", help="config that gaps are relative to (default: baseline)")
    parser.add_argument(
        "--expect",
        metavar="CONFIG=SEEDS",
        nargs="+",
        action="extend",
        default=[],
        help="runs that should exist; SEEDS: 1,2,3 or 0-4",
    )
    parser.add_argument("--stale-after", type=float, default=600.0, help="seconds, see above (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder for the table and the picture (default: the first ROOT)")
    try:
        return _collect(parser.parse_args(argv))
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _collect(options: argparse.Namespace) -> int:
    expect = names.expected(options.expect)
    output: Path = options.output or options.roots[0]
    _check(options, output)
    found, problems = runs.collect(options.roots, expect, now=time.time(), stale_after=options.stale_after)
    if not found:
        got = ", ".join(map(names.shown, options.roots))
        raise CommandError(f"ROOT: got {got}, with no run below; allowed: folders with runs of pretrain.py; correct it")
    known = sorted({run.config for run in found})
    if options.baseline is not None and options.baseline not in known:
        raise CommandError(f"--baseline: got {options.baseline!r}; allowed: {', '.join(known)}; correct it")
    baseline: str = options.baseline or "baseline"
    problems += configs.contradictions(found, baseline)
    summarized = configs.summarize(found, baseline)
    rows = table.config_rows(summarized)
    # Brackets in a name must not be read as markup.
    print_table("Collected runs", list(table.CONFIG_COLUMNS), [[escape(cell) for cell in row] for row in rows])
    if problems:
        print(f"problems: {len(problems)}, listed in collected.md")
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_whole(output / "collected.csv", table.to_csv(found))
        write_whole(output / "collected.md", table.to_markdown(found, summarized, problems, baseline))
        drawn = curves.draw(found, output / "curves.png")
    except OSError as error:
        reason = error.strerror or error
        raise CommandError(
            f"--output: got {names.shown(output)} ({reason}); allowed: a folder that can be written to; give another"
        ) from error
    print(f"written: {names.shown(output)}: collected.csv, collected.md{', curves.png' if drawn else ''}")
    if not drawn:
        print("no picture: matplotlib is missing (pip install 'ds_quant[plot]')")
    return 0 if all(run.state == runs.DONE for run in found) else 1


def _check(options: argparse.Namespace, output: Path) -> None:
    for root in options.roots:
        if not root.is_dir():
            raise CommandError(f"ROOT: got {names.shown(root)}; allowed: existing folders; fix: correct the path")
    if not options.stale_after >= 0:
        raise CommandError(f"--stale-after: got {options.stale_after}; allowed: seconds, 0 or more; correct it")
    if runs.is_run(output):
        # The run's own curves.png would be lost.
        raise CommandError(
            f"--output: got {names.shown(output)}, the folder of a run; allowed: any other folder; give one"
        )


if __name__ == "__main__":
    sys.exit(main())
