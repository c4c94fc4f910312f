"""Loss on the held-out domain of runs that have ended, by `ds_quant evaluate`, many in one process."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from collecting import runs

from ds_quant.cli.shared.errors import CommandError
from studying import plan, protocol, results
from studying.plan import Key, Settings
from studying.rows import Row

_MOST = 24
"""Runs a process: what it measured before an interruption is kept."""


def measure(keys: Sequence[Key], rows: Mapping[str, Row], settings: Settings, csv: Path, text: Path) -> None:
    """Fill `other_loss` of those whose model is still there, with the quantizers that they were trained with.

    Raises:
        CommandError: the evaluation failed.
    """
    known = results.read(csv)
    waiting = [
        key
        for key in keys
        if key in known
        and known[key].state == runs.DONE
        and known[key].other_loss != known[key].other_loss
        and has_model(key, rows[key.row], settings)
    ]
    for first in range(0, len(waiting), _MOST):
        part = waiting[first : first + _MOST]
        losses = losses_of_runs(part, rows, settings, text)
        known = results.read(csv)
        changed = {key: dataclasses.replace(known[key], other_loss=losses[key]) for key in part}
        results.write(csv, {**known, **changed}.values())


def has_model(key: Key, row: Row, settings: Settings) -> bool:
    """Whether the run's model is still there."""
    return (plan.folder(key, row, settings) / "model").is_dir()


def losses_of_runs(
    keys: Sequence[Key], rows: Mapping[str, Row], settings: Settings, text: Path, quantizers: str = "trained"
) -> dict[Key, float]:
    """Losses of the models of these runs, in nats a token; quantizers: "trained", or "off" for none.

    Raises:
        CommandError: the evaluation failed.
    """
    folders = {str(plan.folder(key, rows[key.row], settings)): key for key in keys}
    found = evaluate([Path(folder) for folder in folders], keys[0], settings, text, (quantizers,))
    # It tells the folder of the weights, which is the run's `model`.
    return {folders[str(Path(row["folder"]).parent)]: loss(row) for row in found}


def evaluate(
    folders: Sequence[Path], key: Key, settings: Settings, text: Path, quantizers: Sequence[str] = ("trained",)
) -> list[dict[str, Any]]:
    """What `ds_quant evaluate` says of runs of the size of `key`: a row for each run and choice of quantizers.

    Raises:
        CommandError: it failed.
    """
    size = protocol.SIZES[key.size]
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "losses.json"
        command = [
            *(sys.executable, "-m", "ds_quant.cli.command", "evaluate", *map(str, folders)),
            *("--quantizers", *quantizers, "--text_file", str(text)),
            *("--join", "eos", "--context_length", str(size.context_length)),
            # Scales of a whole tensor depend on what is in a batch: as in training.
            *("--batch_size", str(size.micro_batch), "--device", settings.device, "--output", str(output)),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": plan.import_path()}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise CommandError(f"held-out domain: {done.stderr.strip()}")
        rows: list[dict[str, Any]] = json.loads(output.read_text(encoding="utf-8"))["rows"]
        return rows


def loss(row: Mapping[str, Any]) -> float:
    """Of one row, in nats a token."""
    return float(next(iter(row["perplexity"].values()))["loss"])
