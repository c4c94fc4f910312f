"""Folders of runs as pretrain.py leaves them, and what the collector makes of them."""

from __future__ import annotations

import csv
import json
import os
import time
from pathlib import Path
from typing import Any

from collecting import runs
from pretraining import metrics

HOUR = 3600.0


def write_metrics(folder: Path, losses: list[float], *, age: float = HOUR) -> None:
    """One evaluation each 20 steps, from step 0; last changed `age` seconds ago."""
    history: list[dict[str, Any]] = [{"step": 20 * place, "eval_loss": loss} for place, loss in enumerate(losses)]
    history += [{"step": 20 * n, "loss": 5.0 - n / 10, "grad_norm": 0.5, "learning_rate": 1e-4} for n in (1, 2)]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.csv"
    path.write_text(metrics.to_csv(metrics.rows_of(history, 4096), header=True))
    os.utime(path, (time.time() - age,) * 2)


def write_summary(folder: Path, **changes: Any) -> None:
    """What a run of 40 steps leaves, as far as the collector looks at it."""
    summary = {
        "preset": "tiny",
        "steps": 40,
        "tokens": 163840,
        "seconds": 142.83,
        "tokens_per_second": 6000.0,
        "first_eval_loss": 7.5,
        "final_eval_loss": 4.5,
        "communication": None,
        "seed": 1,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps({**summary, **changes}, indent=2) + "\n")


def a_done_run(root: Path, config: str, seed: int, final: float = 4.5, **changes: Any) -> Path:
    folder = root / config / f"seed-{seed}"
    write_metrics(folder, [7.5, 5.5, final])
    write_summary(folder, seed=seed, final_eval_loss=final, **changes)
    return folder


def rows_of(output: Path) -> dict[str, dict[str, str]]:
    """collected.csv by CONFIG/seed-N."""
    with (output / "collected.csv").open(newline="") as file:
        return {f"{row['config']}/seed-{row['seed']}": row for row in csv.DictReader(file)}


def problems_of(output: Path) -> list[str]:
    lines = (output / "collected.md").read_text().split("## Problems\n")[1].splitlines()
    return [line.removeprefix("- ") for line in lines if line.startswith("- ")]


def only_run(root: Path) -> tuple[runs.Run, list[str]]:
    found, problems = runs.collect([root], {}, now=time.time(), stale_after=600.0)
    assert len(found) == 1
    return found[0], problems
