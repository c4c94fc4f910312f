"""`sbatch slurm/sweep.sh`: from one command to one table."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from conftest import ROOT
from helpers.study_results import a_result
from slurm_cluster import Cluster, running, wait_for
from slurm_runs import FLAGS, write_corpus
from studying import commands, plan, processors, results, rows
from studying.plan import Key, Settings
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
    # Rank 0 prints the error, though rank 1 meets it first.
    (tmp_path / "sitecustomize.py").write_text("import os, time\nif os.environ.get('RANK') == '0': time.sleep(4)\n")
    job = cluster.submit(*options, "slurm/pretrain.sbatch", "--nonsense", PYTHONPATH=f"{tmp_path}:{ROOT}")
    cluster.wait_for_job(job, 120, log.read_text)
    assert "1 nodes (n1) with 2 ranks each" in log.read_text()
    assert log.read_text().count("got the unknown flag --nonsense") == 2, "one rank says it, and it is tried twice"
    assert "gave up: it ended twice before it took its output folder" in log.read_text()


@pytest.mark.slow
def test_the_study_tunes_and_goes_on(cluster: Cluster, tmp_path: Path, token_shards: Path) -> None:
    """One of three learning rates is left to tune. The row follows, and cannot make its folder at first."""
    path, study, ratio = tmp_path / "runs.csv", tmp_path / "study", 0.02
    text = Settings(study, token_shards).text
    made_up = [a_result("baseline", 0, 9.0, text=text, rate=rate) for rate in (0.002, 0.008)]
    # By their key alone: what they have beside it is not asked for.
    results.write(path, [replace(one, key=replace(one.key, ratio=ratio)) for one in made_up])
    flags = ("--rows", "w8a8", "--seeds", "0", "--ratio", str(ratio), "--runs", str(study), "--csv", str(path))
    chain = StudyChain(cluster, study, (*flags, "--corpus", str(token_shards)))
    key = Key("0.7m", "llama", ratio, 0.004, "w8a8", 0)
    folder = plan.folder(key, rows.all_rows()["w8a8"], Settings(study, token_shards))
    folder.parent.mkdir(parents=True)
    folder.touch()
    code, printed = chain.run()
    assert code == "1:0", printed
    assert [line for line in printed.splitlines() if "as job array" in line or "not done" in line] == [
        *re.findall(r"submitted: 1 runs as job array [0-9]+, logs in .*", printed),
        f"not done: {plan.shown(key)}",
    ]
    assert printed.count("as job array") == 2, "the tuning, then the row, and no third time"
    assert {one.row for one in results.read(path)} == {"baseline"}

    folder.unlink()
    code, printed = chain.run()
    assert code == "0:0", printed
    assert printed.count("as job array") == 1
    found = results.read(path)
    assert {(one.rate, one.row) for one in found} == {
        (0.002, "baseline"),
        (0.004, "baseline"),
        (0.004, "w8a8"),
        (0.008, "baseline"),
    }
    assert found[key].steps == plan.steps(key, Settings(study, token_shards))
    assert found[key].processor == processors.where("cpu")["processor"]
    assert found[key].loss != found[replace(key, row="baseline")].loss
    # The same without Slurm has the same losses.
    here = tmp_path / "here.csv"
    results.write(here, [one for at, one in found.items() if at.rate != key.rate])
    places = {str(study): str(tmp_path / "here"), str(path): str(here)}
    assert commands.run(["run", *(places.get(word, word) for word in chain.flags)], description="") == 0
    assert {at: one.loss for at, one in results.read(here).items()} == {at: one.loss for at, one in found.items()}
    # What is done is left alone.
    code, printed = chain.run()
    assert (code, printed.count("as job array")) == ("0:0", 0), printed


@dataclass(frozen=True)
class StudyChain:
    """`sbatch slurm/sweep.sh study`, to the end of the last job."""

    cluster: Cluster
    study: Path
    flags: tuple[str, ...]

    def run(self) -> tuple[str, str]:
        """The exit code of the last job, and what all of them printed."""
        log = self.study.parent / "driver.out"
        log.unlink(missing_ok=True)
        job: object = self.cluster.submit(
            *(f"--output={log}", "--nodes=1", "--time=7", "slurm/sweep.sh", "study", *self.flags), PYTHONPATH=str(ROOT)
        )
        printed = ""
        while True:
            ended = self.cluster.wait_for_job(job, 200, self.explain)
            said = log.read_text()
            printed += said
            behind = re.search(r"submitted: job ([0-9]+) goes on", said)
            if behind is None:
                return ended["ExitCode"], printed
            job, log = behind[1], self.study / "logs" / f"{behind[1]}-collect.out"

    def explain(self) -> str:
        logs = sorted(self.study.glob("logs/*"))
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in logs) + self.cluster.log()


def test_the_study_is_refused(cluster: Cluster, tmp_path: Path, token_shards: Path) -> None:
    log = tmp_path / "job.out"
    flags = ("--runs", str(tmp_path / "study"), "--corpus", str(token_shards), "--csv", str(tmp_path / "runs.csv"))
    for more, environment, said in (
        ((), {"RANKS_PER_NODE": "2"}, "got 2 ranks a run; allowed: 1"),
        (("--rows", "w5"), {}, "--rows: got 'w5'"),
    ):
        job = cluster.submit(f"--output={log}", "slurm/sweep.sh", "study", *flags, *more, **environment)
        assert cluster.wait_for_job(job, 60)["ExitCode"] == "2:0"
        assert said in log.read_text()
        log.unlink()
    assert not list(tmp_path.glob("study/plans/*"))
