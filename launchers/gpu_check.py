"""Acceptance test on a GPU: checks the promises for GPUs in eight steps, which take at most ten minutes together.

    python launchers/gpu_check.py --out runs/gpu_check
    python launchers/gpu_check.py --out runs/gpu_check --steps 1,4
    python launchers/gpu_check.py --out /tmp/gpu_check --dry-run

Each step runs in its own process and is killed, with everything it started, when its time is up; a failed step does not
stop the others. step-N.json is written after each step. report.md is written at the end, with a verdict on each promise
and all tables. --dry-run follows the same paths on the CPU with small sizes and gives no verdicts. No step needs the
network. If a peer's package is missing (torchao), the tables say "not installed".

Exit status: 0 if everything measured is as promised, 1 if a promise was missed or a step failed, 2 for a request that
cannot be fulfilled.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the package benchmarks is

from benchmarks.gpu_check import environment, plan, promises, report, running
from ds_quant.base.whole_folder import write_json
from ds_quant.cli.shared.errors import CommandError


def main(argv: list[str] | None = None) -> int:
    """Run the steps and give the verdicts; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="gpu_check.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--steps", help="numbers, separated by commas (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="run on the CPU with small sizes; gives no verdicts")
    options = parser.parse_args(argv)
    try:
        return _run(options)
    except CommandError as error:
        print(f"gpu_check.py: {error}", file=sys.stderr)
        return CommandError.exit_status


def _run(options: argparse.Namespace) -> int:
    steps = _steps(options.steps)
    where = environment.found(dry_run=options.dry_run)
    if not options.dry_run and not where["device"]:
        raise CommandError(
            "gpu_check: got no GPU that torch sees; allowed: a CUDA device; run it where there is one, or with "
            "--dry-run for the same ways on the CPU"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "environment.json", where)
    for key, value in where.items():
        print(f"{key}: {value}", flush=True)
    results = _run_steps(steps, options)
    verdicts = promises.judge_all(results)
    status = promises.exit_status(verdicts, results)
    page = report.page(where, verdicts, results)
    summary = {
        "environment": where,
        "exit_status": status,
        "verdicts": [
            {**verdict.promise._asdict(), "outcome": verdict.outcome, "measured": verdict.measured, "why": verdict.why}
            for verdict in verdicts
        ],
    }
    write_json(options.out / "summary.json", summary)
    path = report.write(options.out, page)
    print(page.partition("\n## 1.")[0] if 1 in results else page)
    print(f"written: {path}")
    return status


def _run_steps(steps: list[plan.Step], options: argparse.Namespace) -> dict[int, dict[str, Any]]:
    """Run the steps one after the other, so that timings hold; a dry run does two at a time, the longest first."""
    end = time.monotonic() + plan.TOTAL_SECONDS

    def run(step: plan.Step) -> dict[str, Any]:
        left = end - time.monotonic()
        # A dry run shares its machine with others, and must not fail because of that.
        seconds = left if options.dry_run else plan.allowed(step, steps[steps.index(step) :], left)
        print(f"step {step.number}: {step.title}", flush=True)
        result = running.run_step(step, options.out, dry_run=options.dry_run, seconds=seconds)
        print(f"step {step.number}: {result['state']}, {result['seconds']} s", flush=True)
        return result

    if not options.dry_run:
        return {step.number: run(step) for step in steps}
    longest_first = sorted(steps, key=lambda step: -step.seconds)
    with ThreadPoolExecutor(2) as pool:
        return dict(zip([step.number for step in longest_first], pool.map(run, longest_first), strict=True))


def _steps(text: str | None) -> list[plan.Step]:
    known = [step.number for step in plan.STEPS]
    if text is None:
        return list(plan.STEPS)
    words = [word.strip() for word in text.split(",")]
    if any(not word.isdecimal() or int(word) not in known for word in words):
        allowed = f"numbers from 1 to {known[-1]}, split by commas"
        raise CommandError(f"--steps: got {text!r}; allowed: {allowed}; correct it")
    return plan.by_numbers([int(word) for word in words])


if __name__ == "__main__":
    sys.exit(main())
