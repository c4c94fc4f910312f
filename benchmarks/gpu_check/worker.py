"""One step in this process: `python -m benchmarks.gpu_check.worker NAME FILE --seconds S [--dry-run]`."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import torch

from benchmarks.gpu_check import plan
from benchmarks.gpu_check.recording import Record


def main() -> None:
    """Run the step; what it records goes to FILE. An exception ends the process with 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=[step.name for step in plan.STEPS])
    parser.add_argument("file", type=Path)
    parser.add_argument("--seconds", type=float, required=True, help="until it is killed")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    step = next(step for step in plan.STEPS if step.name == options.name)
    torch.manual_seed(0)
    record = Record(options.file, seconds=options.seconds, dry_run=options.dry_run)
    importlib.import_module(f"benchmarks.gpu_check.{step.name}").run(record)
    record.check_complete(step.number)


if __name__ == "__main__":
    main()
