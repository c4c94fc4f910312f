"""`sbatch slurm/sweep.sh`: from one command to one table."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT
from slurm_cluster import Cluster, running, wait_for
from slurm_runs import FLAGS, write_corpus
from sweeping import slurm

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running() as started:
        yield started


@dataclass(frozen=True)
class Sweep:
    """One folder that sweeps are submitted for."""

    cluster: Cluster
    folder: Path
    asked: dict[str, str]

    def submit(self, *options: str) -> tuple[str, str]:
        """Run the driver to its end; what it printed, and the id of the job that collects."""
        log = self.folder / "driver.out"
        log.unlink(missing_ok=True)
        driver = self.cluster.submit(f"--output={log}", *options, "slurm/sweep.sh", PYTHONPATH=str(ROOT), **self.asked)
        ended = self.cluster.wait_for_job(driver, 120)
        printed = log.read_text()
        assert ended["JobState"] == "COMPLETED", printed
        collection = re.search(r"submitted: job ([0-9]+) collects", printed)
        assert collection, printed
        return printed, collection[1]

    def states(self, collection: str, timeout: float, *, code: int) -> dict[str, str]:
        """Wait for the job that collects, which ends with `code`; the states of its table."""
        ended = self.cluster.wait_for_job(collection, timeout, self.explain)
        assert ended["ExitCode"] == f"{code}:0", self.explain()
        with (self.folder / "sweep" / "collected.csv").open(newline="") as file:
            return {f"{row['config']}/seed-{row['seed']}": row["state"] for row in csv.DictReader(file)}

    def dry_run(self) -> list[list[str]]:
        """The words of each line of the plan."""
        _, printed = self.cluster.run("bash", "slurm/sweep.sh", "--dry-run", **self.asked)
        return [line.split() for line in printed.splitlines()[:-1]]

    def explain(self) -> str:
        logs = sorted(self.folder.glob("sweep/logs/*"))
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in logs) + self.cluster.log()


def test_a_sweep_ends_in_one_table(cluster: Cluster, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "documents.jsonl")
    counts = ("--max_steps", "6", "--eval_steps", "3", "--save_steps", "3", "--train_file", str(corpus))
    asked = {
        "CONFIGS": "baseline w8a8",
        "SEEDS": "1-2",
        "SWEEP_DIR": str(tmp_path / "sweep"),
        "PRETRAIN_ARGS": shlex.join([*FLAGS, *counts]),
        "MAX_PARALLEL": "2",
    }
    sweep = Sweep(cluster, tmp_path, asked)
    expected = {f"{config}/seed-{seed}": 1 for config in ("baseline", "w8a8") for seed in (1, 2)}
    printed, collection = sweep.submit("--nodes=1", "--time=7", "--exclude=n4")
    assert "4 runs (4 missing): 4 to run" in printed
    array = re.search(r"submitted: 4 runs as job array ([0-9]+), options (.*), logs", printed)
    assert array
    assert array[2] == "--partition=low --time=00:07:00 --nodes=1 --exclude=n4"
    _, queue = cluster.run("squeue", "--noheader", "--array", "--states=RUNNING", f"--job={array[1]}")
    assert len(queue.splitlines()) <= 2
    # A second submission would leave all of them to the jobs that they have.
    plan = sweep.dry_run()
    assert {row[0] for row in plan} == {"keep"}
    assert [row[4] for row in plan].count("queued") >= 2
    # The warning before a time limit, for the last task, whose plain number is that of the array: it alone goes back
    # into the queue, and the collection waits for it.
    log = tmp_path / "sweep" / "logs" / f"{array[1]}_3.out"
    wait_for(lambda: log.exists() and "rendezvous" in log.read_text(), 200, "the last task", sweep.explain)
    cluster.run("scancel", "--batch", "--signal=USR1", f"{array[1]}_3", timeout=120)
    assert sweep.states(collection, 400, code=0) == dict.fromkeys(expected, "done")
    assert "back into the queue" in log.read_text()
    assert f"job {array[1]}_3, restart 1: 1 nodes" in log.read_text()
    for other in range(3):
        assert "restart 1" not in log.with_name(f"{array[1]}_{other}.out").read_text()
    assert_done(tmp_path / "sweep", expected)
    page = (tmp_path / "sweep" / "collected.md").read_text()
    assert re.search(r"\| w8a8 \| 2 done \| .*\| [+-]0\.\d{4} \| [+-]\d+\.\d{4} to [+-]\d+\.\d{4} \| 2 \|", page)
    assert (tmp_path / "sweep" / "curves.png").stat().st_size > 10_000
    assert len(list((tmp_path / "sweep" / "logs").glob(f"{array[1]}_*.out"))) == 4
    first = {name: (tmp_path / "sweep" / name / "metrics.csv").stat().st_mtime_ns for name in expected}

    # Again, on two nodes: what is gone, and neither what is done nor what would diverge again.
    shutil.rmtree(tmp_path / "sweep" / "w8a8" / "seed-2")
    diverged = tmp_path / "sweep" / "baseline" / "seed-1" / "status.json"
    diverged.write_text(diverged.read_text().replace('"done"', '"diverged"'))
    printed, collection = sweep.submit("--nodes=2", "--time=7")
    assert "4 runs (1 diverged, 2 done, 1 missing): 1 to run" in printed, printed
    states = dict.fromkeys(expected, "done") | {"baseline/seed-1": "diverged"}
    assert sweep.states(collection, 200, code=1) == states
    second = {name: (tmp_path / "sweep" / name / "metrics.csv").stat().st_mtime_ns for name in expected}
    assert {name for name in expected if first[name] != second[name]} == {"w8a8/seed-2"}
    assert_done(tmp_path / "sweep", expected | {"w8a8/seed-2": 2})
    printed, collection = sweep.submit()
    assert "nothing is to run" in printed
    assert sweep.states(collection, 60, code=1) == states


def assert_done(folder: Path, ranks: dict[str, int]) -> None:
    """Each run has had all its steps, on so many ranks, with its seed and config."""
    for name, world_size in ranks.items():
        summary = json.loads((folder / name / "summary.json").read_text())
        assert (summary["world_size"], summary["steps"], summary["seed"]) == (world_size, 6, int(name[-1]))
        assert summary["config"] == json.loads((ROOT / "ds_configs" / f"{name.split('/')[0]}.json").read_text())


@pytest.mark.parametrize(
    ("script", "environment", "said"),
    [
        ("sweep.sh", {"CONFIGS": "w8a9"}, "did you mean 'w8a8'?"),
        ("sweep.sh", {"PRETRAIN_ARGS": "--max_stepz 3"}, "did you mean --max_steps?"),
        ("sweep.sh", {"RANKS_PER_NODE": "5"}, "cannot be divided among 5 processes"),
        ("pretrain.sbatch", {"RANKS_PER_NODE": "two"}, "RANKS_PER_NODE: got 'two'; allowed: 1 or more"),
        ("pretrain.sbatch", {"MAX_RESTARTS": "-1"}, "MAX_RESTARTS: got '-1'; allowed: 0 or more"),
    ],
)
def test_mistakes_start_nothing(
    cluster: Cluster, tmp_path: Path, script: str, environment: dict[str, str], said: str
) -> None:
    log = tmp_path / "job.out"
    job = cluster.submit(f"--output={log}", f"slurm/{script}", SWEEP_DIR=str(tmp_path / "sweep"), **environment)
    assert cluster.wait_for_job(job, 60)["ExitCode"] == "2:0"
    assert log.read_text().count("error: ") == 1
    assert said in log.read_text()
    assert not list(tmp_path.glob("sweep/logs/*"))


@pytest.mark.parametrize("script", ["sweep.sh", "pretrain.sbatch"])
def test_submitted_from_elsewhere(cluster: Cluster, tmp_path: Path, script: str) -> None:
    # Slurm runs a copy: the script cannot know where it lay.
    _, printed = cluster.run("sbatch", "--parsable", "--output=job.out", ROOT / "slurm" / script, cwd=tmp_path)
    assert cluster.wait_for_job(printed.strip(), 60)["ExitCode"] == "2:0"
    assert f"submitted from {tmp_path}, which has no launchers/" in (tmp_path / "job.out").read_text()


@pytest.mark.parametrize(
    "options",
    [
        ["--partition=high", "--time=00:50:00", "--nodes=2", "--gres=gpu:2"],
        ["--partition=low", "--time=00:10:00", "--nodes=1", "--mem=100M", "--gpus=2", "--exclusive"],
        ["--partition=low", "--nodes=2", "--ntasks-per-node=2", "--no-requeue"],
        ["--partition=low", "--nodes=1", "--nodelist=n2", "--cpus-per-task=2"],
        ["--partition=low", "--nodes=2", "--exclude=n[1-2]", "--mem-per-cpu=50M", "--ntasks=4"],
    ],
)
def test_slurm_tells_the_options_that_a_job_was_given(cluster: Cluster, options: list[str]) -> None:
    if not any(option.startswith("--time") for option in options):
        options.insert(1, "--time=00:05:00")
    job = cluster.submit("--output=/dev/null", *options, "--wrap=true")
    cluster.wait_for_job(job, 30)
    _, shown = cluster.run("scontrol", "--oneliner", "show", "job", job)
    assert sorted(slurm.options_of(shown)) == sorted(options)


def test_ranks_are_those_of_the_gpus(cluster: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "job.out"
    options = ("--nodes=1", "--gpus-per-node=2", f"--output={log}")
    job = cluster.submit(*options, "slurm/pretrain.sbatch", "--nonsense", PYTHONPATH=str(ROOT))
    cluster.wait_for_job(job, 120, log.read_text)
    assert "1 nodes (n1) with 2 ranks each" in log.read_text()
    assert log.read_text().count("got the unknown flag --nonsense") == 2, "one rank says it, and it is tried twice"
    assert "gave up: it ended twice before it took its output folder" in log.read_text()
