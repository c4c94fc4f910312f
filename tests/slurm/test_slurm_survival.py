"""What clusters do to jobs: each ends with the losses of the undisturbed run, bit for bit."""

from __future__ import annotations

import functools
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster, running, wait_for
from slurm_runs import (
    EVERY,
    STEPS,
    Job,
    assert_equal_runs,
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
def reference(cluster: Cluster, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The undisturbed run; it may not have ended yet."""
    return submit(cluster, corpus, tmp_path_factory.mktemp("reference") / "run", "--nodes=2", "--time=10")


def test_signals_to_the_steps_and_a_killed_rank(cluster: Cluster, corpus: Path, reference: Job, tmp_path: Path) -> None:
    signalled = submit(cluster, corpus, tmp_path / "signalled", "--nodes=2", "--time=10")
    before = signalled.wait_for_checkpoint()
    with signalled.frozen() as ranks:
        # Without --batch it reaches the steps only: the batch script learns of it from status.json.
        cluster.run("scancel", "--signal=USR1", signalled.id)
        _wait_until_asked(signalled, ranks)
    assert reference.wait()["JobState"] == "COMPLETED", reference.explain()
    assert reference.resumed_from() == []

    killed = submit(cluster, corpus, tmp_path / "killed", "--nodes=2", "--time=10")
    last = killed.wait_for_checkpoint()
    (rank,) = killed.ranks(killed.nodes()[1])
    os.kill(rank, signal.SIGKILL)

    ended = signalled.wait()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), signalled.explain()
    assert "back into the queue: state stopped" in signalled.log()
    (step,) = signalled.resumed_from()
    assert before <= step < STEPS
    assert_equal_runs(signalled, reference)

    ended = killed.wait()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), killed.explain()
    assert "state: failed retry" in killed.log()
    assert "starting again on the same nodes" in killed.log()
    (step,) = killed.resumed_from()
    assert last <= step < STEPS
    assert step % EVERY == 0
    assert_equal_runs(killed, reference)


def test_time_limit_and_preemption(cluster: Cluster, corpus: Path, reference: Job, tmp_path: Path) -> None:
    # The warning may come half a minute early: with a limit of a minute from the beginning it could come before
    # the first step.
    options = ("--nodes=2", "--time=10", "--signal=B:USR1@30", "-wn1,n2")
    limited = submit(cluster, corpus, tmp_path / "limited", *options)
    limited.wait_for_checkpoint()
    with limited.frozen() as ranks:
        cluster.run("scontrol", "update", f"jobid={limited.id}", "timelimit=1")
        _wait_until_asked(limited, ranks)
    wait_for(lambda: cluster.job(limited.id).get("Restarts") == "1", 60, "the requeue", limited.explain)
    cluster.run("scontrol", "update", f"jobid={limited.id}", "timelimit=10")
    preempted = submit(cluster, corpus, tmp_path / "preempted", "--nodes=2", "--time=10", "-wn3,n4")
    last = preempted.wait_for_checkpoint()
    with preempted.frozen():
        urgent = cluster.submit("-phigh", "-wn3,n4", "--exclusive", "--time=1", "-o/dev/null", "--wrap=sleep 5")
        wait_for(lambda: cluster.job(preempted.id)["JobState"] != "RUNNING", 60, "preemption", preempted.explain)
    ended = preempted.wait()
    assert cluster.wait_for_job(urgent, 10)["JobState"] == "COMPLETED"
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), preempted.explain()
    (step,) = preempted.resumed_from()
    assert last <= step < STEPS
    assert_equal_runs(preempted, reference)

    ended = limited.wait()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), limited.explain()
    assert "SIGUSR1: the ranks are asked for a checkpoint" in limited.log()
    (step,) = limited.resumed_from()
    assert 0 < step < STEPS
    assert_equal_runs(limited, reference)


def test_death_of_a_node_and_a_node_that_only_seemed_dead(
    cluster: Cluster, corpus: Path, reference: Job, tmp_path: Path
) -> None:
    reference.wait()
    dead = submit(cluster, corpus, tmp_path / "dead", "--nodes=2", "--time=10")
    # Both ranks on one node: no other node tells them that they were given up.
    lost = submit(cluster, corpus, tmp_path / "lost", "--nodes=1", "--ntasks=2", "--time=10", RANKS_PER_NODE="2")
    last = dead.wait_for_checkpoint()
    (node,) = set(dead.nodes()) - {dead.nodes()[0]}
    cluster.kill_node(node)

    lost.wait_for_checkpoint()
    (alone,) = lost.nodes()
    old = lost.ranks(alone)
    assert len(old) == 2
    # Slurm hears no more of the node, and its job lives on: frozen, until another has taken the work over.
    cluster.kill_daemon(alone)
    everything = cluster.processes(alone)
    for pid in everything:
        os.kill(pid, signal.SIGSTOP)
    seen = lost.newest_checkpoint()
    wait_until_running(lost, 1)
    (elsewhere,) = lost.nodes()
    assert elsewhere != alone
    wait_for(lambda: lost.resumed_from(), 120, "the second writer", lost.explain)
    for pid in everything:
        os.kill(pid, signal.SIGCONT)

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
    assert "tokenizer of 64 pieces" in json.loads((wrong.output_dir / "status.json").read_text())["reason"]
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


def _living(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]
