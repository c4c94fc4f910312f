"""What studies of losses share: training a config if that has not been done, and reading what a run left."""

import csv
import json
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def train(output: Path, config: Path, *flags: str, ranks: int = 1) -> None:
    """Train the default job of launchers/pretrain.py with `config`, one thread a rank, unless `output` has a result."""
    if (output / "summary.json").exists():
        return
    command = ["deepspeed", "--num_gpus", ranks, ROOT / "launchers" / "pretrain.py", "--deepspeed", config]
    # A run that ends with an error is a row of the table too.
    subprocess.run(
        [*map(str, command), *flags, "--output_dir", str(output)], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def summary(output: Path) -> dict | None:
    path = output / "summary.json"
    return json.loads(path.read_text()) if path.exists() else None


def final(output: Path) -> float | None:
    """The last validation loss."""
    found = summary(output)
    return found and found["final_eval_loss"]


def evaluations(output: Path) -> dict[int, float]:
    """Validation loss by step."""
    with (output / "metrics.csv").open() as file:
        return {int(row["step"]): float(row["eval_loss"]) for row in csv.DictReader(file) if row["eval_loss"]}


def gaps(output: Path, baseline: Path) -> dict[int, float]:
    """Validation loss less the baseline's, by step."""
    own, base = evaluations(output), evaluations(baseline)
    return {step: own[step] - base[step] for step in own if step in base}


def cell(loss: float | None, base: float) -> str:
    return "" if loss is None else f"{loss:.4f} ({loss - base:+.4f})"
