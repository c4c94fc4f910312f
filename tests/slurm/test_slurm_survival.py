"""What clusters do to jobs: each ends with the losses of the undisturbed run, bit for bit."""

from __future__ import annotations

import functools
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from helpers.launching import run_ranks
from slurm_cluster import Cluster, running, send, wait_for
from slurm_runs import (
    CONFIG,
    EVERY,
    STEPS,
    Job,
    arguments,
    assert_equal_runs,
    freeze_node,
    frozen,
    is_pending,
    submit,
    wait_until_running,
    write_corpus,
)
from survival import status

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running() as started:
        yield started


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "documents.jsonl")


@pytest.fixture(scope="module")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the undisturbed run of two ranks, which needs no cluster."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    run_ranks(ROOT / "launchers" / "pretrain.py", *arguments(CONFIG, corpus, folder), timeout=200)
    return folder


def test_a_time_limit_signals_a_killed_rank_and_preemption(
    cluster: Cluster, corpus: Path, reference: Path, tmp_path: Path
) -> None:
    # Two jobs at a time, to each of which two things happen. The limit is set when there is a checkpoint: with a limit
    # of two minutes from the beginning the warning could precede the first step.
    limited = submit(cluster, corpus, tmp_path / "limited", "--nodes=2", "--time=10", "--signal=B:USR1@90", "-wn1,n2")
    signalled = submit(cluster, corpus, tmp_path / "signalled", "--nodes=2", "--time=10", "-wn3,n4")
    with frozen({limited: 0, signalled: 0}) as ranks:
        cluster.run("scontrol", "update", f"jobid={limited.id}", f"timelimit={minutes_with_time_to_stop(limited)}")
        # Without --batch it reaches the steps only: the batch script learns of it from status.json.
        cluster.run("scancel", "--signal=USR1", signalled.id)
        before = signalled.newest_checkpoint()
        for job in (limited, signalled):
            _wait_until_asked(job, ranks[job])
    for job in (limited, signalled):
        wait_for(functools.partial(has_restarted, job), 60, "the requeue", job.explain)
    cluster.run("scontrol", "update", f"jobid={limited.id}", "timelimit=10")

    warned, asked = limited.newest_checkpoint(), signalled.newest_checkpoint()
    with frozen({limited: warned, signalled: asked}) as ranks:
        last, newest = limited.newest_checkpoint(), signalled.newest_checkpoint()
        os.kill(ranks[limited][1], signal.SIGKILL)
        urgent = cluster.submit("-phigh", "-wn3,n4", "--exclusive", "--time=1", "-o/dev/null", "--wrap=sleep 5")
        wait_for(lambda: cluster.job(signalled.id)["JobState"] != "RUNNING", 60, "preemption", signalled.explain)

    ended = limited.wait()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), limited.explain()
    assert "SIGUSR1: the ranks are asked for a checkpoint" in limited.log()
    assert "state: failed retry" in limited.log()
    assert "starting again on the same nodes" in limited.log()
    first, step = limited.resumed_from()
    assert 0 < first <= warned
    assert last <= step < STEPS
    assert step % EVERY == 0
    assert_equal_runs(limited, reference)

    ended = signalled.wait()
    assert cluster.wait_for_job(urgent, 10)["JobState"] == "COMPLETED"
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "2"), signalled.explain()
    assert "back into the queue: state stopped" in signalled.log()
    first, step = signalled.resumed_from()
    assert before <= first <= asked
    assert newest <= step < STEPS
    assert_equal_runs(signalled, reference)


def test_death_of_a_node_and_a_node_that_only_seemed_dead(
    cluster: Cluster, corpus: Path, reference: Path, tmp_path: Path
) -> None:
    dead = submit(cluster, corpus, tmp_path / "dead", "--nodes=2", "--time=10")
    # Both ranks on one node: no other node tells them that they were given up.
    lost = submit(cluster, corpus, tmp_path / "lost", "--nodes=1", "--ntasks=2", "--time=10", RANKS_PER_NODE="2")
    # Neither ends while the other starts.
    with frozen({dead: 0, lost: 0}) as ranks:
        last = dead.newest_checkpoint()
        (node,) = set(dead.nodes()) - {dead.nodes()[0]}
        cluster.kill_node(node)
        (alone,) = lost.nodes()
        old = ranks[lost]
        assert len(old) == 2
        # Slurm hears no more of the node, and its job lives on: frozen, until another has taken the work over.
        cluster.kill_daemon(alone)
    stopped = freeze_node(lost, alone)
    seen = lost.newest_checkpoint()
    wait_until_running(lost, 1)
    (elsewhere,) = lost.nodes()
    assert elsewhere != alone
    wait_for(lambda: lost.resumed_from(), 120, "the second writer", lost.explain)
    # One that goes on may end others before it is their turn.
    send(stopped, signal.SIGCONT)

    def first_writer_has_ended() -> bool:
        # Until then, and from now on, what is written comes from the second one.
        told = status.read(lost.output_dir)
        assert told is not None
        assert told["restart_count"] == 1, lost.explain()
        return not _living(old)

    wait_for(first_writer_has_ended, 90, "the end of the first writer's ranks", lost.explain)

    ended = dead.wait()
    assert ended["JobState"] == "COMPLETED", dead.explain()
    assert int(ended["Restarts"]) >= 1
    assert dead.resumed_from()[0] >= last
    assert_equal_runs(dead, reference)

    ended = lost.wait()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), lost.explain()
    # The first one's srun, when it wakes up, may kill the step of the same number: the second one's. It goes on.
    assert lost.resumed_from()[0] == seen
    assert "was started again elsewhere; leaving" in lost.log()
    assert_equal_runs(lost, reference)


def test_what_would_not_get_further_ends(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    cancelled = submit(cluster, corpus, tmp_path / "cancelled", "--nodes=1", "--time=10")
    diverging = submit(cluster, corpus, tmp_path / "diverging", "--nodes=1", more=("--learning_rate", "1e30"))
    wrong = submit(cluster, corpus, tmp_path / "wrong", "--nodes=1", more=("--vocab_size", "64"))
    cancelled.wait_for_checkpoint()
    cluster.run("scancel", cancelled.id)
    assert cancelled.wait()["JobState"] == "CANCELLED"
    for job, code, state in ((diverging, 3, "diverged"), (wrong, 4, "failed")):
        ended = job.wait()
        assert (ended["ExitCode"], ended["Restarts"]) == (f"{code}:0", "0"), job.explain()
        assert job.log().count("rendezvous") == 1, "it was started once"
        told = status.read(job.output_dir)
        assert told is not None
        assert (told["state"], told["retry"]) == (state, False)
    assert "got 64 pieces" in json.loads((wrong.output_dir / "status.json").read_text())["reason"]
    # It had the time that Slurm gives, KillWait, for a checkpoint; and it stays cancelled.
    wait_for(lambda: (status.read(cancelled.output_dir) or {}).get("state") == "stopped", 30, "its last checkpoint")
    assert "back into the queue" not in cancelled.log()
    assert cluster.job(cancelled.id)["Restarts"] == "0"

    # Submitted again on twice as many nodes, it goes on with the same global batch.
    grown = submit(cluster, corpus, tmp_path / "cancelled", "--nodes=2", "--time=10")
    assert grown.wait()["JobState"] == "COMPLETED", grown.explain()
    assert "was saved by 1 ranks, this run has 2: converting" in grown.log()
    summary = json.loads((grown.output_dir / "summary.json").read_text())
    assert summary["world_size"] == 2
    assert summary["resumed_from_step"] > 0
    assert summary["tokens"] == STEPS * 4 * 32


def _wait_until_asked(job: Job, ranks: list[int]) -> None:
    """Wait until stopped ranks have SIGUSR1, which asks them for a checkpoint."""
    asked = functools.partial(is_pending, signal.SIGUSR1)
    wait_for(lambda: all(map(asked, ranks)), 90, "SIGUSR1 at the ranks", job.explain)


def has_restarted(job: Job) -> bool:
    return job.cluster.job(job.id).get("Restarts") == "1"


def minutes_with_time_to_stop(job: Job) -> int:
    """A time limit that leaves a job a minute or more. Slurm has limits in minutes and looks at them every 30 seconds.

    The warning, which is to come 90 seconds before, then comes at once, and 30 seconds before the end at the latest.
    """
    hours, minutes, _ = map(int, job.cluster.job(job.id)["RunTime"].split(":"))
    return hours * 60 + minutes + 2


def _living(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]
