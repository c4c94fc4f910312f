"""Finds the folders of runs and reads each run from its folder."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from survival import status

from collecting import files, names
from collecting.files import number

DONE, RUNNING, STOPPED, DIVERGED, FAILED, MISSING = STATES = (
    *("done", "running", "stopped", "diverged", "failed", "missing"),
)
_TRACES = ("summary.json", "metrics.csv", status.NAME)
_CHECKPOINT = re.compile(r"checkpoint-([0-9]+)")


@dataclass(frozen=True)
class Run:
    """One run. Values that could not be read are None."""

    config: str
    seed: int | None
    state: str
    """One of STATES."""
    reason: str = ""
    """Why it stopped, diverged or failed, if known."""
    folder: str = ""
    steps: int | None = None
    """Optimizer steps taken, if known."""
    final_eval_loss: float | None = None
    """Nats per token; for a run that is not done, the last measured loss."""
    best_eval_loss: float | None = None
    """Nats per token, the lowest in metrics.csv."""
    tokens_per_second: float | None = None
    wire_bytes_per_step: int | None = None
    """Bytes that rank 0 sent per step; None if gradients were not sent, or were sent in full precision."""
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    num_unreadable_rows: int = 0
    """Rows of metrics.csv that were left out."""
    evaluations: dict[int, float] = field(default_factory=dict)
    """Validation loss in nats per token by step."""


def collect(
    roots: Iterable[Path], expect: Mapping[str, set[int]], *, now: float, stale_after: float
) -> tuple[list[Run], list[str]]:
    """All runs below `roots` and the missing ones of `expect`, sorted; and the problems found, one per line.

    Args:
        roots: folders to search.
        expect: seeds that each config should have.
        now: the time, in seconds since the epoch.
        stale_after: a run is dead if its metrics.csv and status.json have not changed for this many seconds.
    """
    runs: list[Run] = []
    problems: list[str] = []
    seen: set[str] = set()
    for root in roots:
        for folder in _find(root, seen, problems):
            run, wrong = read(folder, root, now=now, stale_after=stale_after)
            runs.append(run)
            problems += wrong
    there = {(run.config, run.seed) for run in runs}
    runs += [
        Run(config, seed, MISSING) for config, seeds in expect.items() for seed in seeds if (config, seed) not in there
    ]
    # Unknown seeds come last.
    runs.sort(key=lambda run: (run.config, math.inf if run.seed is None else run.seed, run.folder))
    return runs, [names.shown(problem) for problem in problems]


def is_run(folder: Path) -> bool:
    """Whether a run left files here."""
    try:
        return any(_is_trace(entry.name, entry.is_dir()) for entry in folder.iterdir())
    except OSError:
        return False


def read(folder: Path, root: Path, *, now: float, stale_after: float) -> tuple[Run, list[str]]:
    """The run in `folder`, found below `root`, and the problems found. Times are in seconds, as in `collect`."""
    summary, broken = files.read_summary(folder / "summary.json")
    metrics = files.read_metrics(folder / "metrics.csv")
    told_state, unclear = files.read_status(folder / status.NAME)
    problems = broken + metrics.problems + unclear
    config, seed = names.of_folder(folder, root)
    evaluations = metrics.evaluations()
    told = summary or {}
    own_seed = _whole(told.get("seed"))
    if seed is not None and own_seed is not None and seed != own_seed:
        problems.append(f"{folder}: it is named as seed {seed}, but its summary.json tells seed {own_seed}")
    steps, last_step = _whole(told.get("steps")), metrics.last_step()
    if steps is not None and last_step is not None and last_step > steps:
        problems.append(f"{folder}: metrics.csv goes to step {last_step}, summary.json to {steps}: it was resumed")
    final = number(told.get("final_eval_loss"))
    if final is None and evaluations:
        final = evaluations[max(evaluations)]
    changed = {name: _changed(folder / name) for name in _TRACES}
    if told_state is not None and changed["summary.json"] > changed[status.NAME]:
        # Killed after its summary and before its last status: the summary is newer.
        told_state = None
    # A broken summary.json also means that the run ended, because it is written last.
    alive = not broken and now - max(changed["metrics.csv"], changed[status.NAME]) <= stale_after
    state, reason = _state(summary, metrics, told_state, alive=alive)
    communication = told.get("communication")
    if not isinstance(communication, dict):
        communication = {}
    run = Run(
        config=config,
        seed=own_seed if seed is None else seed,
        state=state,
        reason=names.shown(reason),
        folder=names.shown(folder),
        steps=steps if steps is not None else _most(last_step, _whole((told_state or {}).get("step")), folder),
        final_eval_loss=final,
        best_eval_loss=min(filter(math.isfinite, evaluations.values()), default=None),
        tokens_per_second=_finite(told.get("tokens_per_second")),
        wire_bytes_per_step=_whole(communication.get("wire_bytes_per_step")),
        seconds=_finite(told.get("seconds")),
        peak_memory_bytes=_whole(told.get("peak_memory_bytes")),
        num_unreadable_rows=metrics.num_unreadable,
        evaluations=evaluations,
    )
    return run, problems


def _state(
    summary: dict[str, Any] | None, metrics: files.Metrics, told: dict[str, Any] | None, *, alive: bool
) -> tuple[str, str]:
    """State and reason. `told` is the content of status.json; `alive`: whether a file changed recently."""
    final = None if summary is None else number(summary["final_eval_loss"])
    state = None if told is None else told["state"]
    reason = str((told or {}).get("reason") or "")
    if state == status.DIVERGED:
        return DIVERGED, reason
    if final is not None and not math.isfinite(final):
        return DIVERGED, f"its last validation loss is {final}"
    if not metrics.all_finite():
        return DIVERGED, reason or "a loss in metrics.csv is NaN or Inf"
    if state in (status.STOPPED, status.FAILED):
        return (STOPPED if state == status.STOPPED else FAILED), reason
    if final is not None and state in (None, status.DONE):
        return DONE, ""
    if state == status.RUNNING or (state is None and metrics.rows is not None):
        return (RUNNING, "") if alive else (FAILED, "killed: its files stopped changing without a word")
    return FAILED, "it says done, and left no summary" if state == status.DONE else "it ended without a word"


def _changed(path: Path) -> float:
    """When the file was changed, in seconds since the epoch; -inf if there is no file."""
    try:
        return path.stat().st_mtime
    except OSError:
        return -math.inf


def _most(last_step: int | None, told: int | None, folder: Path) -> int | None:
    known = [step for step in (last_step, told) if step is not None]
    return max(known) if known else _last_checkpoint(folder)


def _find(root: Path, seen: set[str], problems: list[str]) -> Iterator[Path]:
    def complain(error: OSError) -> None:
        problems.append(f"{error.filename}: {error.strerror}")

    # Links are followed, because runs are often on another disk; `seen` ends cycles.
    for place, folders, plain in os.walk(root, onerror=complain, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folder = Path(place)
        found = any(_is_trace(name, True) for name in folders) or any(_is_trace(name, False) for name in plain)
        if found:
            yield folder
        elif names.names_a_seed(folder):
            problems.append(
                f"{folder}: it is named as a run, but has no summary.json, metrics.csv, status.json or checkpoint"
            )
        inside = [name for name in folders if not name.startswith(".") and not _CHECKPOINT.fullmatch(name)]
        folders[:] = sorted(name for name in inside if not (found and name == "model"))


def _is_trace(name: str, is_folder: bool) -> bool:
    return _CHECKPOINT.fullmatch(name) is not None if is_folder else name in _TRACES


def _last_checkpoint(folder: Path) -> int | None:
    try:
        matches = [_CHECKPOINT.fullmatch(path.name) for path in folder.iterdir() if path.is_dir()]
    except OSError:
        return None
    return max((int(match[1]) for match in matches if match), default=None)


def _finite(value: object) -> float | None:
    found = number(value)
    return found if found is not None and math.isfinite(found) else None


def _whole(value: object) -> int | None:
    found = _finite(value)
    return int(found) if found is not None and found == int(found) else None
