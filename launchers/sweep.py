"""Plan and submit a sweep: every config with every seed, as a Slurm job array.

    sbatch slurm/sweep.sh                    plan, submit the runs still to do, and collect when all have ended
    bash slurm/sweep.sh --dry-run            print the plan; needs no Slurm

Options come from the command line or, in capitals, from the environment: CONFIGS="w8a8 baseline" SEEDS=0-4.
Each run inherits the options of sbatch itself (nodes, GPUs, partition, time limit).

The run of a config and seed writes to SWEEP_DIR/CONFIG/seed-N. Runs that are missing, stopped or failed are started.
Runs that are done, have diverged or have a living job are left alone. To repeat a run, remove its folder.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sweeping import hours, matrix, plan, slurm
from sweeping.plan import Entry

from ds_quant.cli.shared.errors import CommandError

ROOT = Path(__file__).resolve().parents[1]


def main(argv: list[str] | None = None) -> int:
    """Plan, and submit unless it is a dry run; returns the exit code."""
    options = _parser().parse_args(argv)
    try:
        if options.task is not None:
            return _print_task(Path(options.task[0]), options.task[1])
        return _sweep(options)
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sweep.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    given = os.environ.get
    parser.add_argument("--configs", default=given("CONFIGS", ""), help="names, patterns or paths (default: all)")
    parser.add_argument("--seeds", default=given("SEEDS", "0 1 2"), help="for example '0 1 2', '1,2,3' or '0-4'")
    parser.add_argument("--sweep-dir", default=given("SWEEP_DIR", "runs/sweep"), help="default: runs/sweep")
    parser.add_argument("--pretrain-args", default=given("PRETRAIN_ARGS", ""), help="flags of pretrain.py for all runs")
    parser.add_argument("--max-parallel", default=given("MAX_PARALLEL", "8"), help="concurrent runs (default: 8)")
    parser.add_argument("--tokens-per-second", help="speed of one run; the plan then shows hours")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and submit nothing")
    parser.add_argument("--task", nargs=2, metavar=("PLAN", "NUMBER"), help=argparse.SUPPRESS)
    return parser


def _sweep(options: argparse.Namespace) -> int:
    configs = matrix.configs(options.configs, Path("ds_configs"))
    seeds = matrix.seeds(options.seeds)
    max_parallel = int(_positive("--max-parallel", options.max_parallel, whole=True))
    speed = None if options.tokens_per_second is None else _positive("--tokens-per-second", options.tokens_per_second)
    more = _words(options.pretrain_args)
    job = os.environ.get("SLURM_JOB_ID")
    if job is None and not options.dry_run:
        raise CommandError(
            "sweep.sh: got no Slurm job around it; allowed: sbatch slurm/sweep.sh, or bash slurm/sweep.sh --dry-run"
        )
    sweep_dir = Path(options.sweep_dir)
    needed: dict[str, int | None] = {}
    if speed is not None or more or not options.dry_run:
        for config in configs:
            sample = plan.arguments(Entry(config, seeds[0], str(sweep_dir), ""), more)
            needed[config.name] = hours.tokens(sample, slurm.world_size())
    if options.dry_run:
        planned = plan.entries(configs, seeds, sweep_dir, _living_if_known(sweep_dir / "plans"))
        _print(planned, needed, speed, max_parallel)
        return 0
    assert job is not None
    with _alone(sweep_dir / "plans"):
        living, arrays = slurm.living(sweep_dir / "plans")
        planned = plan.entries(configs, seeds, sweep_dir, living)
        _print(planned, needed, speed, max_parallel)
        _submit(planned, more, sweep_dir, job, arrays, max_parallel)
    return 0


def _living_if_known(plans: Path) -> dict[tuple[str, int], str] | None:
    """The runs that have a job; None if there is no Slurm or it does not answer."""
    if not slurm.available():
        return None
    try:
        return slurm.living(plans)[0]
    except CommandError as error:
        print(f"not known which runs have a job: {error}", file=sys.stderr)
        return None


def _submit(
    planned: list[Entry], more: list[str], sweep_dir: Path, job: str, arrays: list[str], max_parallel: int
) -> None:
    own = slurm.own_options(job)
    path = sweep_dir / "plans" / f"{time.strftime('%Y%m%dT%H%M%S')}-{job}.json"
    count = plan.write(path, planned, more)
    if count:
        array = slurm.submit_array(path, count, max_parallel, own, sweep_dir / "logs")
        print(f"submitted: {count} runs as job array {array}, options {shlex.join(own)}, logs in {sweep_dir}/logs")
        arrays = [*arrays, array]
    else:
        path.unlink()
        print("nothing is to run")
    expected: dict[str, list[int]] = {}
    for entry in planned:
        expected.setdefault(entry.config.name, []).append(entry.seed)
    command = [sys.executable, "launchers/collect.py", str(sweep_dir), "--expect"]
    command += [f"{name}={','.join(map(str, seeds))}" for name, seeds in expected.items()]
    collection = slurm.submit_after(shlex.join(command), arrays, own, sweep_dir / "logs")
    print(f"submitted: job {collection} collects into {sweep_dir}/collected.md when they have ended")


def _print(planned: list[Entry], needed: dict[str, int | None], speed: float | None, max_parallel: int) -> None:
    """Print a line for each run to stdout, and the totals to stderr."""
    width = max(len(entry.config.name) for entry in planned)
    total = 0.0
    for entry in planned:
        duration = ""
        if speed is not None:
            count = needed[entry.config.name]
            if count is None:
                raise CommandError(
                    "--tokens-per-second: got no --max_steps in PRETRAIN_ARGS or the preset to tell hours from; "
                    "allowed: with --max_steps; give it"
                )
            own = count / speed / 3600 if entry.to_run else 0.0
            total += own
            duration = f"{own:8.2f} h  "
        what = "run " if entry.to_run else "keep"
        print(f"{what}  {entry.config.name:<{width}}  seed {entry.seed:<3}  {entry.state:<8}  {duration}{entry.folder}")
    sys.stdout.flush()
    states = Counter(entry.state for entry in planned)
    to_run = sum(entry.to_run for entry in planned)
    summary = (
        f"{len(planned)} runs ({', '.join(f'{count} {state}' for state, count in states.items())}): {to_run} to run"
    )
    if speed is not None:
        summary += f", {total:.2f} hours, {total / max(min(max_parallel, to_run), 1):.2f} with {max_parallel} at a time"
    print(summary, file=sys.stderr)


def _print_task(path: Path, number: str) -> int:
    """Print the arguments of one task, each ended by a zero byte, as mapfile -d '' reads them."""
    tasks = plan.tasks(path)
    if not number.isdigit() or int(number) >= len(tasks):
        raise CommandError(f"task: got {number!r}; allowed: 0 to {len(tasks) - 1}, as in {path}; submit again")
    sys.stdout.write("".join(f"{word}\0" for word in tasks[int(number)][1]))
    return 0


def _words(text: str) -> list[str]:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise CommandError(f"PRETRAIN_ARGS: got {text!r} ({error}); allowed: words as a shell reads them") from error
    hours.refuse_own(words)
    return words


def _positive(name: str, text: str, *, whole: bool = False) -> float:
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        value = 0
    if not 0 < value < float("inf"):
        raise CommandError(
            f"{name}: got {text!r}; allowed: {'whole numbers' if whole else 'numbers'} above 0; correct it"
        )
    return value


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lock the folder: two sweeps planned at the same time would both start the missing runs."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise CommandError(f"SWEEP_DIR: got {folder.parent} ({error}); allowed: a folder to write to") from error


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
