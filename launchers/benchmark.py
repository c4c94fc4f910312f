"""Measure what is fast beside what others do, in one process on one machine.

    python launchers/benchmark.py optimizer [--sizes 1M,10M,50M,2000x1024] [--rounds 15]

Each subcommand prints a table and writes a CSV with versions, processor and commit. Contenders take turns within every
round, so that a noisy neighbour hits all of them; compare ratios, not seconds.
"""

from __future__ import annotations

import argparse
import sys

from benchmarking import optimizer
from benchmarking.results import BenchmarkError


def main(argv: list[str] | None = None) -> int:
    """Run one benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    optimizer.add_arguments(commands.add_parser("optimizer", help=optimizer.HELP))
    options = parser.parse_args(argv)
    try:
        options.run(options)
    except BenchmarkError as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
