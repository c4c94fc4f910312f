"""Small pre-training jobs on the test cluster, watched and compared."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from conftest import ROOT
from slurm_cluster import Cluster, send, wait_for
from survival import status

from ds_quant.cli.shared.run_folder import read_metrics

CONFIG = "ds_configs/w8a8g8.json"
STEPS, EVERY = 120, 10
# A model so small that a step takes some 50 ms, with rounding that depends on the step, and data read twice.
FLAGS = (
    *("--config_overrides", "num_hidden_layers=2,hidden_size=32,intermediate_size=64"),
    *("--vocab_size", "512", "--context_length", "32", "--global_batch_size", "4", "--max_eval_sequences", "8"),
    *("--warmup_steps", "1", "--validation_fraction", "0.2", "--logging_steps", "1", "--disable_tqdm", "true"),
    *("--save_total_limit", "3", "--overwrite_output_dir", "false"),
)


def write_corpus(path: Path) -> Path:
    """The package's own source as documents, .jsonl."""
    sources = sorted((ROOT / "ds_quant").rglob("*.py"))
    texts = [source.read_text().encode("ascii", "ignore").decode()[:4000] for source in sources]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@dataclass(frozen=True)
class Job:
    """A job of slurm/pretrain.sbatch."""

    cluster: Cluster
    id: int
    output_dir: Path

    def log(self) -> str:
        """What its batch script and its ranks printed."""
        path = self.output_dir.with_suffix(".out")
        return path.read_text(errors="replace") if path.exists() else "(no output)"

    def explain(self) -> str:
        """All that a failed test should show."""
        return f"{self.log()[-6000:]}\n{self.cluster.log()}"

    def newest_checkpoint(self) -> int:
        """Step of the newest checkpoint, -1 without one."""
        numbers = [int(path.name.split("-")[1]) for path in self.output_dir.glob("checkpoint-*")]
        return max(numbers, default=-1)

    def wait_for_checkpoint(self, after: int = 0, timeout: float = 150) -> int:
        """Wait until there is a checkpoint of a step past `after`; the newest one's step."""

        def holds() -> bool:
            assert self.cluster.job(self.id).get("JobState") in ("PENDING", "RUNNING"), self.explain()
            return self.newest_checkpoint() > after

        wait_for(holds, timeout, f"a checkpoint past step {after} in {self.output_dir}", self.explain)
        return self.newest_checkpoint()

    def wait(self, timeout: float = 240) -> dict[str, str]:
        """Wait until it has ended for good; what `scontrol show job` says then."""
        return self.cluster.wait_for_job(self.id, timeout, self.explain)

    def resumed_from(self) -> list[int]:
        """The steps that it resumed from, in order."""
        return [int(step) for step in re.findall(r"Resuming from \S*checkpoint-([0-9]+)", self.log())]

    def ranks(self, node: str) -> list[int]:
        """Process ids of the ranks on a node."""
        found = []
        for pid in self.cluster.processes(node):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            # The command lines of torchrun, srun and the batch shell name the folder as well.
            is_rank = words[0].endswith(b"python") and b"torch.distributed.run" not in words
            if is_rank and str(self.output_dir).encode() in words:
                found.append(pid)
        return found

    def nodes(self) -> list[str]:
        """The nodes that it runs on, its batch script on the first."""
        _, printed = self.cluster.run("scontrol", "show", "hostnames", self.cluster.job(self.id)["NodeList"])
        return printed.split()


@contextlib.contextmanager
def frozen(past: dict[Job, int]) -> Iterator[dict[Job, list[int]]]:
    """Stop the ranks of each job once it has a checkpoint past a step, that it does not end before something happens.

    Begins when all jobs are stopped, with the ranks of each, and lets them go on at its end.
    """
    ranks: dict[Job, list[int]] = {}

    def hold() -> bool:
        for job in past.keys() - ranks.keys():
            if job.newest_checkpoint() > past[job]:
                ranks[job] = [rank for node in job.nodes() for rank in job.ranks(node)]
                send(ranks[job], signal.SIGSTOP)
                assert ranks[job], job.explain()
        return len(ranks) == len(past)

    try:
        wait_for(hold, 200, f"checkpoints past {list(past.values())}", lambda: "".join(map(Job.explain, past)))
        yield ranks
    finally:
        for stopped in ranks.values():
            send(stopped, signal.SIGCONT)


def arguments(config: Path | str, corpus: Path, output_dir: Path, *more: object) -> list[str]:
    """Arguments of pretrain.py for a run of STEPS steps with a checkpoint at each EVERY of them."""
    counts = ("--max_steps", STEPS, "--eval_steps", STEPS // 4, "--save_steps", EVERY)
    files = ("--train_file", corpus, "--output_dir", output_dir)
    return [str(word) for word in ("--deepspeed", config, *FLAGS, *counts, *files, *more)]


def submit(
    cluster: Cluster,
    corpus: Path,
    output_dir: Path,
    *options: object,
    more: Sequence[object] = (),
    **environment: str,
) -> Job:
    """Submit slurm/pretrain.sbatch with options of sbatch, and `more` flags of pretrain.py."""
    command = arguments(CONFIG, corpus, output_dir, *more)
    log = f"--output={output_dir.with_suffix('.out')}"
    job = cluster.submit(log, *options, "slurm/pretrain.sbatch", *command, PYTHONPATH=str(ROOT), **environment)
    return Job(cluster, job, output_dir)


def assert_equal_runs(job: Job, reference: Path) -> None:
    """Both are done, with the same training loss at each step and the same last validation loss, bit for bit."""
    folders = (job.output_dir, reference)
    losses = {}
    for folder in folders:
        assert json.loads((folder / "status.json").read_text())["state"] == "done", job.explain()
        rows = read_metrics(folder / "metrics.csv")
        assert [row["step"] for row in rows] == list(range(STEPS + 1)), "each step once"
        losses[folder] = [row["train_loss"] for row in rows]
    assert losses[job.output_dir] == losses[reference]
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in folders)
    assert first["final_eval_loss"] == second["final_eval_loss"]
    assert first["final_eval_loss"] < first["first_eval_loss"] - 1
    assert not list(job.output_dir.glob(".checkpoint*")) + list(job.output_dir.glob(".writing*"))


def wait_until_running(job: Job, restarts: int, timeout: float = 120) -> None:
    """Wait until a job runs for the `restarts`-th time again."""

    def holds() -> bool:
        shown = job.cluster.job(job.id)
        return shown.get("JobState") == "RUNNING" and int(shown["Restarts"]) >= restarts

    wait_for(holds, timeout, f"restart {restarts} of job {job.id}", job.explain)
    time.sleep(0.5)


def freeze_node(job: Job, node: str) -> set[int]:
    """Stop all that runs on a node, while nobody there replaces the job's status; the process ids of what is stopped.

    What one of them had begun to write when it was stopped it would write when it goes on: no lease can keep it from
    that.
    """
    stopped: set[int] = set()

    def between_writes() -> bool:
        # What was listed may have ended since, and started others: what is stopped cannot.
        while found := set(job.cluster.processes(node)) - stopped:
            send(found, signal.SIGSTOP)
            stopped.update(found)
        if not list(job.output_dir.glob(f".{status.NAME}.*.tmp")):
            return True
        send(stopped, signal.SIGCONT)
        stopped.clear()
        return False

    wait_for(between_writes, 30, f"a moment at which nobody writes to {job.output_dir}")
    return stopped


def is_pending(signum: int, pid: int) -> bool:
    """Whether a stopped process has a signal to take when it goes on."""
    masks = re.findall(r"^(?:Sig|Shd)Pnd:\s*(\S+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return any(int(mask, 16) >> (signum - 1) & 1 for mask in masks)
