"""Reads the status.json, summary.json and metrics.csv of a run that may have been killed at any moment.

Nothing here raises because of a file's content. For a broken file the functions return a description of the problem.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretraining.plots import Rows
from survival import status

_NEEDED = ("step", "train_loss", "eval_loss")
# Far above any figure of a run; its square still fits into a float.
_LARGEST = 1e100


@dataclass(frozen=True)
class Metrics:
    """A metrics.csv. `rows` is None if there is no file or nothing in it can be read."""

    rows: Rows | None = None
    num_unreadable: int = 0
    problems: list[str] = field(default_factory=list)

    def evaluations(self) -> dict[int, float]:
        """Validation loss in nats per token by step, including NaN and Inf."""
        found: dict[int, float] = {}
        for row in self.rows or []:
            step, loss = row["step"], row["eval_loss"]
            if step is not None and loss is not None:
                found[int(step)] = loss
        return found

    def last_step(self) -> int | None:
        steps = [int(row["step"]) for row in self.rows or [] if row["step"] is not None]
        return max(steps, default=None)

    def all_finite(self) -> bool:
        """Whether no training or validation loss is NaN or Inf."""
        losses = (row[column] for row in self.rows or [] for column in ("train_loss", "eval_loss"))
        return all(loss is None or math.isfinite(loss) for loss in losses)


def number(value: object) -> float | None:
    """`value` as a float, NaN and Inf included; None for anything else and for values too large for a run's figure."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if isinstance(value, int) and abs(value) > _LARGEST:
        return None
    found = float(value)
    return None if math.isfinite(found) and abs(found) > _LARGEST else found


def read_status(path: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """A status.json, and what is wrong with it. None: there is no file, or it has no state."""
    found, problems = _json(path)
    if problems or found is None:
        return None, problems
    if not isinstance(found, dict) or found.get("state") not in status.STATES:
        return None, [f"{path}: it is no status of pretrain.py, since it has no state {', '.join(status.STATES)}"]
    return found, []


def read_summary(path: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """A summary.json, and what is wrong with it. None: there is no file, or it does not say how the run ended."""
    found, problems = _json(path)
    if problems or found is None:
        return None, problems
    if not isinstance(found, dict) or "final_eval_loss" not in found:
        return None, [f"{path}: it is no summary of pretrain.py, since it has no final_eval_loss"]
    if number(found["final_eval_loss"]) is None:
        return None, [f"{path}: its final_eval_loss is no number"]
    return found, []


def read_metrics(path: Path) -> Metrics:
    """A metrics.csv. Incomplete rows are left out and counted, and so is a last line without a line break."""
    content, problems = _content(path)
    if content is None:
        return Metrics(problems=problems)
    if not content.strip():
        return Metrics(problems=[f"{path}: it is empty"])
    # Fields are never quoted. With csv.reader, one stray quotation mark would swallow all following lines.
    lines = content.decode("utf-8-sig", errors="replace").split("\n")
    header = lines[0].strip("\r").split(",")
    if not set(_NEEDED) <= set(header):
        return Metrics(
            problems=[f"{path}: it is no metrics.csv of pretrain.py: no line {','.join(_NEEDED)} at its top"]
        )
    rows: Rows = []
    bad: list[int] = []
    for position, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        row = _row(header, line.strip("\r"))
        # The last of `lines` follows the last line break, so a number in it may be truncated.
        if row is None or position == len(lines):
            bad.append(position)
        else:
            rows.append(row)
    if bad:
        where = f"line {bad[0]}" if len(bad) == 1 else f"lines {bad[0]} to {bad[-1]}"
        problems = [f"{path}: {len(bad)} of {len(bad) + len(rows)} rows cannot be read ({where})"]
    return Metrics(rows, len(bad), problems)


def _row(header: list[str], line: str) -> dict[str, float | None] | None:
    fields = line.split(",")
    if len(fields) != len(header):
        return None
    try:
        row = {name: float(text) if text else None for name, text in zip(header, fields, strict=True)}
    except ValueError:
        return None
    step = row["step"]
    if step is None or not 0 <= step < 2**53 or step != int(step):
        return None
    if any(value is not None and number(value) is None for value in row.values()):
        return None
    return row


def _json(path: Path) -> tuple[Any, list[str]]:
    """The content of a JSON file; None without problems: there is no such file."""
    content, problems = _content(path)
    if content is None:
        return None, problems
    if not content.strip():
        return None, [f"{path}: it is empty"]
    try:
        # A file of brackets nests too deeply and raises RecursionError.
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        return None, [f"{path}: it is no JSON, or was cut short ({_one_line(error)})"]
    return (found, []) if found is not None else (None, [f"{path}: it is no JSON object"])


def _content(path: Path) -> tuple[bytes | None, list[str]]:
    """The bytes of a file; None without problems: there is no such file."""
    if not os.path.lexists(path):
        return None, []
    if not path.is_file():
        # Reading a pipe would wait forever.
        return None, [f"{path}: it is no regular file"]
    try:
        return path.read_bytes(), []
    except OSError as error:
        return None, [f"{path}: {_one_line(error.strerror or error)}"]


def _one_line(reason: object) -> str:
    return (str(reason).splitlines() or [""])[0]
