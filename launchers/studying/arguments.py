"""The flags of launchers/study.py."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from studying import plan, protocol, results
from studying.rows import BASELINE

PAGE = plan.ROOT / "docs" / "study.md"
RUNS = Path("runs/study")


def parser(description: str, handlers: Mapping[str, Callable[[argparse.Namespace], int]]) -> argparse.ArgumentParser:
    """Each command sets `do` to its handler."""
    parser = argparse.ArgumentParser(
        prog="study.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, what: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=what, allow_abbrev=False)
        command.set_defaults(do=handlers[name])
        return command

    more = "0 1 2, then 3-7 where effects are small"
    _add_choices(add("run", "train what is missing"), seeds=more)
    command = add("submit", "train it as jobs of Slurm: sbatch slurm/sweep.sh study ...")
    _add_choices(command, seeds=more)
    command.add_argument("--max-parallel", type=int, default=8, help="concurrent runs (default: 8)")
    command.set_defaults(most_ranks=1)
    # Of the jobs that go on where the first one has begun.
    command.add_argument("--chain", help=argparse.SUPPRESS)
    command.add_argument("--resources", default="", help=argparse.SUPPRESS)
    _add_choices(add("plan", "print it, train nothing"), seeds=more)
    command = add("tables", "docs/study.md and its pictures from the CSV")
    command.add_argument("--csv", type=Path, default=results.PATH, help="default: docs/results/study/runs.csv")
    command.add_argument("--page", type=Path, default=PAGE, help="default: docs/study.md")
    command = add("repeat", "train runs of the CSV again and compare")
    _add_choices(command, rows="one of each table", seeds="0")
    _add_choices(add("post-training", "models with quantizers put in after training, or taken out"), seeds="0 1 2")
    command = add("adapt", "the baseline's models trained on with quantizers, beside quantized after as many steps")
    _add_rows(command, default="all that quantize weights or activations alone")
    command.set_defaults(scales=[1.0], at_once=1)
    _add_models(command, seeds="0 1 2")
    command = add("isolate", "outliers or sharpness: the baseline's models, changed in one of them, quantized")
    command.set_defaults(rows=[BASELINE], scales=[1.0], at_once=1)
    _add_models(command, seeds="0 1 2")
    command = add("memory", "peaks of a whole step with quantized gradients; in bf16, on CPUs")
    _add_sizes(command, default="5m")
    command.add_argument("--csv", type=Path, default=results.PATH, help="kept beside it (default: docs/...)")
    command = add("smoke", "short runs against measured limits")
    command.add_argument("--runs", type=Path, default=RUNS, help="default: runs/study")
    command.add_argument("--seeds", help="measure the limits anew with these seeds, at least 5, into its CSV")
    command.add_argument("--at-once", type=int, default=2, help="runs at a time (default: 2)")
    return parser


def _add_choices(command: argparse.ArgumentParser, *, rows: str = "all", seeds: str) -> None:
    _add_rows(command, default=rows)
    command.add_argument("--scales", nargs="+", type=float, default=[1.0], help="of the tuned learning rate")
    command.add_argument("--other-domain", type=Path, help="with --corpus: text of the held-out domain (.txt, .jsonl)")
    command.add_argument("--at-once", type=int, default=2, help="runs at a time (default: 2)")
    _add_models(command, seeds=seeds)


def _add_rows(command: argparse.ArgumentParser, *, default: str) -> None:
    command.add_argument("--rows", nargs="+", default=None, metavar="ROW", help=f"default: {default}")


def _add_models(command: argparse.ArgumentParser, *, seeds: str) -> None:
    _add_sizes(command, default="0.7m")
    command.add_argument("--seeds", help=f"such as '0 1 2' or '0-7' (default: {seeds})")
    command.add_argument("--ratio", default="1", help="tokens a parameter (default: 1)")
    command.add_argument("--runs", type=Path, default=RUNS, help="default: runs/study")
    command.add_argument("--corpus", type=Path, help="tokens of one's own, by launchers/tokenize_corpus.py")
    command.add_argument("--csv", type=Path, default=results.PATH, help="where figures are kept (default: docs/...)")
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    command.set_defaults(most_ranks=None)


def _add_sizes(command: argparse.ArgumentParser, *, default: str) -> None:
    sizes = ", ".join(protocol.SIZES)
    command.add_argument("--sizes", nargs="+", default=[default], help=f"default: {default}; of {sizes}")
    command.add_argument("--families", nargs="+", default=["llama"], help="default: llama; of llama, gpt2")
