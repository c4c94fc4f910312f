"""The state of each run of a sweep, and the runs still to start."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from collecting import runs

from ds_quant.cli.shared.errors import CommandError
from sweeping.matrix import Config

Task = tuple[tuple[str, int], list[str]]
"""Config and seed, which tell runs apart, and pretrain.py's arguments."""
QUEUED = "queued"
"""The run has a job that has not started yet."""
# A diverged run would diverge again. The cause of a failure may be gone; whoever submits again must know.
_TO_RUN = (runs.MISSING, runs.STOPPED, runs.FAILED)
_STALE_AFTER = 600.0


@dataclass(frozen=True)
class Entry:
    """One run of a sweep."""

    config: Config
    seed: int
    folder: str
    state: str
    """One of `collecting.runs.STATES`, or QUEUED."""

    @property
    def to_run(self) -> bool:
        """Whether submitting the sweep now would start it."""
        return self.state in _TO_RUN

    @property
    def key(self) -> tuple[str, int]:
        return self.config.name, self.seed


def entries(
    configs: Sequence[Config],
    seeds: Sequence[int],
    sweep_dir: Path,
    living: Mapping[tuple[str, int], str] | None,
) -> list[Entry]:
    """All runs, seed by seed, so that the first results cover every config.

    Args:
        configs: the configs.
        seeds: the seeds of each.
        sweep_dir: the root of the output folders.
        living: QUEUED or RUNNING for each (config, seed) that has a Slurm job. None: there is no Slurm to ask, and
            a run whose files changed in the last minutes counts as running.
    """
    planned = []
    for seed in seeds:
        for config in configs:
            folder = sweep_dir / config.name / f"seed-{seed}"
            state = _state(folder, sweep_dir)
            if living is not None and state not in (runs.DONE, runs.DIVERGED):
                job = living.get((config.name, seed))
                # Without a job, it was just killed, or runs outside of Slurm and keeps others out by itself.
                state = job or (runs.FAILED if state == runs.RUNNING else state)
            planned.append(Entry(config, seed, str(folder), state))
    return planned


def arguments(entry: Entry, more: Sequence[str]) -> list[str]:
    """The arguments of pretrain.py for one run; `more` has the flags of all runs."""
    return [
        *("--deepspeed", entry.config.path, "--seed", str(entry.seed), "--output_dir", entry.folder),
        *("--resume_from_checkpoint", "auto", *more),
    ]


def write(path: Path, planned: Iterable[Entry], more: Sequence[str]) -> int:
    """Write the runs to start, numbered as tasks of a job array; returns their number."""
    return write_tasks(path, [(entry.key, arguments(entry, more)) for entry in planned if entry.to_run])


def write_tasks(path: Path, runs_to_start: Sequence[Task]) -> int:
    """Write tasks for `tasks` to read; returns their number."""
    content = [{"config": name, "seed": seed, "arguments": words} for (name, seed), words in runs_to_start]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"tasks": content}, indent=1) + "\n")
    return len(content)


def tasks(path: Path) -> list[Task]:
    """Config and seed, and pretrain.py's arguments, of each task that `write` wrote.

    Raises:
        CommandError: the file does not exist or is not a plan.
    """
    try:
        content = json.loads(path.read_text())
        return [
            ((str(task["config"]), int(task["seed"])), list(map(str, task["arguments"]))) for task in content["tasks"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CommandError(f"plan: got {path} ({error}); allowed: a file that sweep.py wrote; submit again") from error


def _state(folder: Path, root: Path) -> str:
    if not runs.is_run(folder):
        return runs.MISSING
    run, _ = runs.read(folder, root, now=time.time(), stale_after=_STALE_AFTER)
    return run.state
