"""The Slurm calls of a sweep: its own job's resources, the runs that have a job, and submitting."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from collecting import runs

from ds_quant.cli.shared.errors import CommandError
from sweeping import plan

_COMMENT = "ds_quant sweep "
"""The job comment of tasks is this and the path of their plan, so that later submissions recognize them."""
_NOT_GIVEN = ("", "(null)", "N/A", "0")
# Fields of `scontrol show job`, and the sbatch options that set them.
_OPTIONS = {
    "Partition": "--partition",
    "Account": "--account",
    "QOS": "--qos",
    "Reservation": "--reservation",
    "TimeLimit": "--time",
    "TimeMin": "--time-min",
    "NumNodes": "--nodes",
    "ReqNodeList": "--nodelist",
    "ExcNodeList": "--exclude",
    "Features": "--constraint",
    "MinMemoryNode": "--mem",
    "MinMemoryCPU": "--mem-per-cpu",
    "MinTmpDiskNode": "--tmp",
    "Licenses": "--licenses",
    "TresPerNode": "--gres",
    "TresPerJob": "--gpus",
}
_ACCOUNTING = ("--partition", "--account", "--qos", "--reservation")


def available() -> bool:
    """Whether there is a Slurm to ask."""
    return shutil.which("squeue") is not None and shutil.which("sbatch") is not None


def living(plans: Path) -> tuple[dict[tuple[str, int], str], list[str]]:
    """The runs for which the user has a job: QUEUED or RUNNING by (config, seed), and the ids of the job arrays.

    Args:
        plans: the folder of the sweep's plans.

    Raises:
        CommandError: Slurm does not answer, or the plan of a job is gone.
    """
    found: dict[tuple[str, int], str] = {}
    arrays: dict[str, None] = {}
    known: dict[Path, list[plan.Task]] = {}
    # Array, index, state, and last the comment, which contains a path.
    for line in _run("squeue", "--me", "--noheader", "--array", "--format=%F|%K|%t|%k").splitlines():
        array, index, state, comment = line.split("|", 3)
        path = Path(comment.removeprefix(_COMMENT).strip())
        if not comment.startswith(_COMMENT) or path.parent != plans.resolve() or not index.isdigit():
            continue
        if path not in known:
            if not path.exists():
                raise CommandError(f"squeue: got job {array} of {path}, which is gone; end it with scancel {array}")
            known[path] = plan.tasks(path)
        key, _ = known[path][int(index)]
        found[key] = plan.QUEUED if state == "PD" else runs.RUNNING
        arrays[array] = None
    return found, list(arrays)


def own_options(job: str) -> list[str]:
    """The sbatch options that give another job the resources of this one. Raises CommandError."""
    return options_of(_run("scontrol", "--oneliner", "show", "job", job))


def options_of(shown: str) -> list[str]:
    """The sbatch options for a line of `scontrol --oneliner show job`. Raises CommandError."""
    fields = dict(re.findall(r"(\S+?)=(\S*)", shown))
    if fields.get("TresPerTask", "(null)") not in _NOT_GIVEN and "gpu" in fields["TresPerTask"]:
        raise CommandError(
            "sbatch: got --gpus-per-task; allowed: --gpus-per-node, since one task starts all ranks of a node; use it"
        )
    options = []
    for field, option in _OPTIONS.items():
        value = fields.get(field, "")
        if value in _NOT_GIVEN or value.upper() in ("UNLIMITED", "PARTITION_LIMIT"):
            continue
        if field.startswith("Tres"):
            # gres:gpu:a100:8 in Slurm 22, gres/gpu:a100:8 in later versions; --gpus takes the part after "gpu".
            value = re.sub(r"gres[:/]", "", value)
            value = re.sub(r"^gpu[:=]", "", value) if field == "TresPerJob" else value
        options.append(f"{option}={value}")
    per_node = fields.get("NtasksPerN:B:S:C", "0").split(":")[0]
    if per_node.isdigit() and int(per_node) > 0:
        options.append(f"--ntasks-per-node={per_node}")
    elif int(fields.get("NumTasks", "0")) > int(fields.get("NumNodes", "1").split("-")[0]):
        options.append(f"--ntasks={fields['NumTasks']}")
    if fields.get("CPUs/Task", "1") not in ("1", "N/A"):
        options.append(f"--cpus-per-task={fields['CPUs/Task']}")
    if fields.get("OverSubscribe") == "NO":
        options.append("--exclusive")
    if fields.get("Requeue") == "0":
        options.append("--no-requeue")
    return options


def submit_array(
    path: Path,
    count: int,
    max_parallel: int,
    options: Sequence[str],
    logs: Path,
    *,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Submit the tasks of a plan as a job array; returns its id.

    `environment` is what the runs have beside what is in this process's. Raises CommandError.
    """
    longest = re.search(r"^MaxArraySize\s*=\s*([0-9]+)", _run("scontrol", "show", "config"), re.MULTILINE)
    if longest and count >= int(longest[1]):
        raise CommandError(
            f"sweep: got {count} runs to start; allowed: below {longest[1]} at a time (Slurm's "
            "MaxArraySize); submit part of them, and the rest later"
        )
    logs.mkdir(parents=True, exist_ok=True)
    return _submit(
        f"--array=0-{count - 1}%{max_parallel}",
        "--job-name=sweep",
        f"--comment={_COMMENT}{path.resolve()}",
        f"--output={logs.resolve()}/%A_%a.out",
        *options,
        "slurm/sweep_task.sbatch",
        str(path.resolve()),
        environment=environment,
    )


def submit_after(command: str, after: Sequence[str], options: Sequence[str], logs: Path, *, minutes: int = 30) -> str:
    """Submit a command to run when the jobs `after` have ended in any way; returns its id. Raises CommandError."""
    logs.mkdir(parents=True, exist_ok=True)
    return _submit(
        *([f"--dependency=afterany:{':'.join(after)}"] if after else []),
        *("--job-name=collect", "--nodes=1", "--ntasks=1", f"--time={minutes}"),
        f"--output={logs.resolve()}/%j-collect.out",
        *(option for option in options if option.startswith(_ACCOUNTING)),
        f"--wrap={command}",
    )


def world_size() -> int:
    """The number of ranks of a run that gets the resources of this job; 1 if not known yet."""
    gpus = os.environ.get("SLURM_GPUS_ON_NODE") or os.environ.get("SLURM_GPUS_PER_NODE") or "1"
    ranks = os.environ.get("RANKS_PER_NODE") or gpus.rpartition(":")[2]
    nodes = os.environ.get("SLURM_JOB_NUM_NODES") or "1"
    return max(int(ranks), 1) * int(nodes) if ranks.isdigit() and nodes.isdigit() else 1


def _submit(*arguments: str, environment: Mapping[str, str] | None = None) -> str:
    # Jobs get the environment of the sbatch that submits them.
    own = {**outside(os.environ), **(environment or {})}
    return _run("sbatch", "--parsable", *arguments, environment=own).strip().split(";")[0]


def outside(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without this job's Slurm variables, which would otherwise reach the jobs that it submits."""
    return {name: value for name, value in environment.items() if not name.startswith("SLURM") or name == "SLURM_CONF"}


def _run(*command: str, environment: Mapping[str, str] | None = None) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CommandError(f"{command[0]}: {error}; submit again when Slurm answers") from error
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[0]
        raise CommandError(f"{' '.join(command[:2])}: {said}")
    return done.stdout
