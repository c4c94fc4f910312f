"""Compare the speed of ds_quant with that of alternatives, on one machine.

    python launchers/benchmark.py optimizer [--sizes 1M,10M,50M,2000x1024] [--rounds 15]
    python launchers/benchmark.py linear [--shapes 768x3072,3072x768] [--tokens 2048]
    python launchers/benchmark.py step [--models gpt2,llama] [--batch 4] [--sequence 512] [--profile]
    python launchers/benchmark.py comm [--sizes 25M] [--ranks 2] [--links loopback,1gbit,100mbit] [--device cuda]
    python launchers/benchmark.py comm-step [--configs A.json,B.json] [--stages 0,1,2] [--links 1gbit,100mbit]
    python launchers/benchmark.py comm-host [--ranks 8] [--bucket 5e8]
    python launchers/benchmark.py host [--parts calls,layers,optimizer,all-reduce]
    python launchers/benchmark.py diagnostics [--preset tiny] [--batch 32] [--sequence 128]
    python launchers/benchmark.py roofline [--page docs/gpu.md]
    python launchers/benchmark.py generated [--hidden 2048] [--tokens 8192]

Each subcommand except comm-host, roofline and generated prints a table and writes a CSV with versions, processor and
commit. roofline predicts and generated counts: neither measures anything. Contenders take turns within every round, so
that a noisy neighbour affects all of them. Compare ratios, not seconds.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the package benchmarks is

from benchmarks import comm, comm_host, comm_step, diagnostics, generated, host, linear, optimizer, roofline, step
from ds_quant.cli.shared.errors import CommandError


def main(argv: list[str] | None = None) -> int:
    """Run one benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    optimizer.add_arguments(commands.add_parser("optimizer", help=optimizer.HELP))
    linear.add_arguments(commands.add_parser("linear", help=linear.HELP))
    step.add_arguments(commands.add_parser("step", help=step.HELP))
    comm.add_arguments(commands.add_parser("comm", help=comm.HELP))
    comm_step.add_arguments(commands.add_parser("comm-step", help=comm_step.HELP))
    comm_host.add_arguments(commands.add_parser("comm-host", help=comm_host.HELP))
    host.add_arguments(commands.add_parser("host", help=host.HELP))
    diagnostics.add_arguments(commands.add_parser("diagnostics", help=diagnostics.HELP))
    roofline.add_arguments(commands.add_parser("roofline", help=roofline.HELP))
    generated.add_arguments(commands.add_parser("generated", help=generated.HELP))
    options = parser.parse_args(argv)
    try:
        options.run(options)
    except CommandError as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
