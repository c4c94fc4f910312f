"""Other ways to start one job on several nodes: DeepSpeed's slurm launcher, accelerate, and pdsh with a hostfile."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT
from helpers.launching import launch
from slurm_cluster import Cluster, running
from slurm_runs import FLAGS, write_corpus

from benchmarks.slow_link import INTERFACE, Link, slow_link, unavailable

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

# As docs/cluster.md has them.
DEEPSPEED_SLURM = """#!/usr/bin/env bash
scontrol show hostnames | sed 's/$/ slots=1/' > "$HOSTS"
deepspeed --launcher slurm --hostfile "$HOSTS" --no_ssh_check --master_addr unused \\
  --launcher_args="--ntasks-per-node=1" launchers/pretrain.py "$@"
"""
ACCELERATE = """#!/usr/bin/env bash
node=$(scontrol show hostnames | head -n 1)
export ADDRESS=$(scontrol --oneliner show node "$node" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
srun --ntasks-per-node=1 bash -c 'exec accelerate launch --config_file slurm/accelerate.yaml \\
  --num_machines "$SLURM_JOB_NUM_NODES" --num_processes "$SLURM_JOB_NUM_NODES" --machine_rank "$SLURM_NODEID" \\
  --main_process_ip "$ADDRESS" --main_process_port $((20000 + SLURM_JOB_ID % 12000)) "$@"' - launchers/pretrain.py "$@"
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "documents.jsonl")


def arguments(corpus: Path, output_dir: Path) -> list[str]:
    counts = ("--max_steps", "4", "--eval_steps", "2", "--save_steps", "2")
    return [*FLAGS, *counts, "--train_file", str(corpus), "--output_dir", str(output_dir)]


def summary_of(output_dir: Path) -> dict[str, object]:
    assert json.loads((output_dir / "status.json").read_text())["state"] == "done"
    return json.loads((output_dir / "summary.json").read_text())


def test_jobs_of_deepspeed_and_accelerate(tmp_path: Path, corpus: Path) -> None:
    with running() as cluster:
        deepspeed = ("--deepspeed", "ds_configs/w8a8.json", *arguments(corpus, tmp_path / "deepspeed"))
        accelerate = arguments(corpus, tmp_path / "accelerate")
        jobs = [
            _submit(cluster, tmp_path / "deepspeed", DEEPSPEED_SLURM, deepspeed, "-wn1,n2"),
            _submit(cluster, tmp_path / "accelerate", ACCELERATE, accelerate, "-wn3,n4"),
        ]
        for job, name in zip(jobs, ("deepspeed", "accelerate"), strict=True):
            log = tmp_path / f"{name}.out"
            assert cluster.wait_for_job(job, 250, log.read_text)["JobState"] == "COMPLETED", log.read_text()
    first, second = summary_of(tmp_path / "deepspeed"), summary_of(tmp_path / "accelerate")
    assert (first["world_size"], second["world_size"]) == (2, 2)
    assert first["final_eval_loss"] == second["final_eval_loss"]
    # Of one rank alone the gradients would be the same too: what was saved tells that there were two.
    for name in ("deepspeed", "accelerate"):
        states = (tmp_path / name / "checkpoint-4").glob("**/*_optim_states.pt")
        assert len(list(states)) == 2


def _submit(cluster: Cluster, output: Path, text: str, words: tuple[str, ...] | list[str], *options: str) -> int:
    script = output.with_suffix(".sbatch")
    script.write_text(text)
    hosts = str(output.with_suffix(".hosts"))
    log = f"--output={output.with_suffix('.out')}"
    return cluster.submit("--nodes=2", log, *options, script, *words, PYTHONPATH=str(ROOT), HOSTS=hosts)


@pytest.mark.skipif(not shutil.which("pdsh"), reason="pdsh is not installed (apt-get install pdsh)")
@pytest.mark.skipif(not shutil.which("sshd"), reason="sshd is not installed (apt-get install openssh-server)")
def test_a_hostfile_across_two_network_namespaces(tmp_path: Path, corpus: Path) -> None:
    reason = unavailable()
    if reason is not None:
        pytest.skip(reason)
    with slow_link("1gbit", 2) as link, _ssh_servers(link, tmp_path / "ssh") as options:
        hosts = tmp_path / "hostfile"
        hosts.write_text("".join(f"{address} slots=1\n" for address in link.addresses))
        # What pdsh does not forward by itself. Without the first, gloo would offer the other node its 127.0.0.1.
        forwarded = {"GLOO_SOCKET_IFNAME": INTERFACE, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        names = ("PATH", "TORCH_EXTENSIONS_DIR", "HF_HUB_OFFLINE", "OMP_WAIT_POLICY")
        forwarded |= {name: os.environ[name] for name in names if name in os.environ}
        forwarded["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = tmp_path / "deepspeed_env"
        environment.write_text("".join(f"{name}={value}\n" for name, value in forwarded.items()))
        start = [
            *("deepspeed", "--hostfile", hosts, "--no_ssh_check", "--master_addr", link.addresses[0]),
            *("launchers/pretrain.py", "--deepspeed", "ds_configs/w8a8.json"),
        ]
        _, printed = launch(
            link.within(0, [str(word) for word in [*start, *arguments(corpus, tmp_path / "run")]]),
            timeout=200,
            env={"PDSH_SSH_ARGS_APPEND": shlex.join(options), "DS_ENV_FILE": str(environment), "PYTHONPATH": str(ROOT)},
        )
        count = link.within(1, ["cat", f"/sys/class/net/{INTERFACE}/statistics/tx_bytes"])
        _, sent = launch(count, timeout=30)
    assert summary_of(tmp_path / "run")["world_size"] == 2, printed
    # Two gradients of 55,296 numbers and more in each of 4 steps.
    assert int(sent) > 1_000_000, "the nodes spoke over the link"


@contextmanager
def _ssh_servers(link: Link, folder: Path) -> Iterator[list[str]]:
    """An sshd in each namespace; the options of ssh that reach them."""
    folder.mkdir(mode=0o700)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-N", "", "-t", "ed25519", "-f", folder / name], check=True, timeout=100)
    (folder / "sshd_config").write_text(
        f"Port 22\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nPidFile none\n"
        "UsePAM no\nStrictModes no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
    )
    # Where Debian's sshd locks itself in before anyone is known.
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    sshd = [shutil.which("sshd") or "sshd", "-D", "-e", "-f", str(folder / "sshd_config")]
    servers = []
    try:
        for rank in range(len(link.addresses)):
            with (folder / f"sshd-{rank}.log").open("wb") as log:
                servers.append(subprocess.Popen(link.within(rank, sshd), stdout=log, stderr=log))
        time.sleep(1.0)
        assert all(server.poll() is None for server in servers), (folder / "sshd-0.log").read_text()
        yield [
            *("-i", str(folder / "user"), "-o", "StrictHostKeyChecking=no", "-o", "LogLevel=ERROR"),
            *("-o", f"UserKnownHostsFile={folder}/known"),
        ]
    finally:
        for server in servers:
            server.kill()
            server.wait()
