"""One rank of `diagnose memory`, started as a module with the path of SPEC.json and a launcher's variables.

Trains for real and writes rank-R.json beside the specification: for each job the figures of the ledger of operators,
and those of torch's own allocator, in the events of torch's profiler.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist

from ds_quant.cli.shared.process_memory import peak_bytes
from ds_quant.planning.job import Job, Outcome, run_job
from ds_quant.planning.ledger import ROLES, Ledger

_MARK = "ds_quant step"


class MarkingLedger(Ledger):
    """Marks in torch's profile, too, where a step begins and ends.

    By an event of the profile: by another clock an allocation could lie on the wrong side.
    """

    def mark(self, name: str) -> None:
        super().mark(name)
        if name == "begin" and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if name in ("begin", "end"):
            with torch.profiler.record_function(f"{_MARK} {name}"):
                pass


def measure(job: Job) -> dict[str, Any]:
    """Train a job; its `Outcome` as "outcome", and of its last step as "allocator_bytes" the allocator's own peak, and
    as "role_peaks" the most that each role had at any time."""
    ledger = MarkingLedger()
    if torch.cuda.is_available() and deepspeed.get_accelerator().device_name().startswith("cuda"):
        with ledger:
            outcome = run_job(job, ledger)
        # No GPU has run this yet.
        return _row(outcome, ledger, torch.cuda.max_memory_allocated(), 0)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler, ledger:
        outcome = run_job(job, ledger)
    recorded = profiler.profiler.kineto_results.events()
    begin, end = (
        max(event.start_ns() for event in recorded if event.name() == f"{_MARK} {name}") for name in ("begin", "end")
    )
    events: list[Any] = [event for event in recorded if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    before = sum(event.nbytes() for event in events if event.start_ns() < begin)
    changes = [event.nbytes() for event in events if begin <= event.start_ns() <= end]
    # Between steps nothing is on its way, and the two should agree. What gloo's threads free the profiler does not see.
    unseen = before - outcome.rest_bytes
    return _row(outcome, ledger, before - unseen + max(itertools.accumulate(changes)), unseen)


def _row(outcome: Outcome, ledger: Ledger, allocator_bytes: int, unseen_bytes: int) -> dict[str, Any]:
    return {
        "outcome": dataclasses.asdict(outcome),
        "role_peaks": {role: ledger.peak("begin", "end", [role]).bytes for role in ROLES},
        "allocator_bytes": allocator_bytes,
        "unseen_bytes": unseen_bytes,
    }


def measure_with_rss(job: Job) -> dict[str, Any]:
    """`measure`, and as "rss_bytes" by how much the process grew at most, as the system counts it."""
    rows: list[dict[str, Any]] = []
    grown = peak_bytes(lambda: rows.append(measure(job)), torch.device("cpu"))
    return {**rows[0], "rss_bytes": grown}


def main() -> None:
    specification = Path(sys.argv[1])
    jobs = [Job(**values) for values in json.loads(specification.read_text())]
    deepspeed.init_distributed()
    rank = dist.get_rank()
    rows = [measure_with_rss(dataclasses.replace(job, rank=rank)) for job in jobs]
    (specification.parent / f"rank-{rank}.json").write_text(json.dumps(rows))
    dist.barrier()
    # Past the interpreter's own teardown: there, gloo's threads abort now and then.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
