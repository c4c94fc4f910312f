"""The study as jobs of Slurm: an array of runs, and a job behind it that keeps their figures and starts what is next.

    sbatch --time=2:00:00 slurm/sweep.sh study --rows w4_channel w4_block32 --seeds 0-2

The first array tunes the learning rate; the rows follow when it has ended, and further seeds after them. The last job
measures the held-out domain. A run that an array of this chain had and that has not ended is not started again: submit
the same command once more, when the reason in its log is mended.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from sweeping import plan as sweep_plan
from sweeping import slurm

from ds_quant.cli.shared.errors import CommandError
from studying import asked, plan, protocol
from studying.plan import Key
from studying.training import Training, alone

Name = tuple[str, int]
"""A run as plans of sweeps have it: its folder without the seed, and the seed."""
_MINUTES = 60
"""Of the jobs in between. The last one evaluates all runs on the held-out domain, at some 15 CPU-seconds each."""


def submit(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Start what can be started, and this command again behind it; the exit code, 1 where runs that were tried failed.

    Raises:
        CommandError: no Slurm job is around it, or runs would have several ranks.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        raise CommandError(
            "study.py submit: got no Slurm job around it; allowed: sbatch slurm/sweep.sh study ...; "
            "study.py plan shows what would be trained"
        )
    if options.max_parallel < 1:
        raise CommandError(f"--max-parallel: got {options.max_parallel}; allowed: 1 or more; correct it")
    if not options.chain and slurm.world_size() != 1:
        raise CommandError(
            f"study.py submit: got {slurm.world_size()} ranks a run; allowed: 1, as all figures of the study have; "
            "submit with --nodes=1 and at most --gpus-per-node=1"
        )
    training = asked.training_of(options)
    runs = training.settings.runs
    plans, logs = runs / "plans", runs / "logs"
    resources = shlex.split(options.resources) if options.chain else slurm.own_options(job)
    chain = options.chain or job
    with alone(runs):
        every, waiting = _next_runs(options, training)
        living, arrays = slurm.living(plans)
        tried = _tried(plans, chain)
        names = {key: _name(key, training) for key in waiting}
        to_start = [key for key in waiting if names[key] not in living.keys() | tried]
        if to_start:
            array = _start(to_start, training, plans / f"{chain}-{job}.json", resources, options.max_parallel)
            print(f"submitted: {len(to_start)} runs as job array {array}, logs in {logs}")
            arrays = [*arrays, array]
        if arrays:
            behind = [sys.executable, str(plan.ROOT / "launchers" / "study.py"), *argv]
            if not options.chain:
                behind += ["--chain", chain, f"--resources={shlex.join(resources)}"]
            after = slurm.submit_after(shlex.join(behind), arrays, resources, logs, minutes=_MINUTES)
            print(f"submitted: job {after} goes on when they have ended")
            return 0
    asked.measure_other_domain(options, training, every)
    for key in waiting:
        print(f"not done: {plan.shown(key)}", file=sys.stderr)
    print(f"{len(every) - len(waiting)} of {len(every)} runs are in {training.csv}; study.py tables makes the page")
    return 1 if waiting else 0


def _next_runs(options: argparse.Namespace, training: Training) -> tuple[list[Key], list[Key]]:
    """All runs that are known to be wanted so far, and those of them that have not ended."""
    every: list[Key] = []
    for size in plan.chosen(options.sizes, protocol.SIZES, "--sizes"):
        for family in plan.chosen(options.families, protocol.FAMILIES, "--families"):
            tuning, rate = asked.tuned(training, size, family, plan.ratio_of(options.ratio), training.waiting)
            every += tuning
            if rate is None:
                continue
            keys = asked.keys(options, size, family, rate)
            every += [key for key in keys if key not in tuning]
            if options.seeds is None and not training.waiting(keys):
                every += asked.more_seeds(options, training, size, family, rate)
    return every, training.waiting(every)


def _start(keys: Sequence[Key], training: Training, path: Path, resources: Sequence[str], max_parallel: int) -> str:
    settings = training.settings
    tasks = [(_name(key, training), plan.pretrain_arguments(key, training.rows[key.row], settings)) for key in keys]
    count = sweep_plan.write_tasks(path, tasks)
    own = plan.environment(settings.device)
    return slurm.submit_array(path, count, max_parallel, resources, settings.runs / "logs", environment=own)


def _tried(plans: Path, chain: str) -> set[Name]:
    """Runs that arrays of the chain have had."""
    return {name for path in plans.glob(f"{chain}-*.json") for name, _ in sweep_plan.tasks(path)}


def _name(key: Key, training: Training) -> Name:
    folder = plan.folder(key, training.rows[key.row], training.settings)
    return str(folder.parent.relative_to(training.settings.runs)), key.seed
