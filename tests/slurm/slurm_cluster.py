"""A Slurm cluster of four nodes on this host: real daemons, one folder, nothing left behind.

Each node has two cores to give, and two devices that it calls GPUs. Their names n1 to n4 do not resolve: Slurm knows
that all of them are at 127.0.0.1. Jobs in partition `high` put those in partition `low` back into the queue.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from conftest import PATIENCE, ROOT, free_port
from helpers.launching import WITHOUT_COMPILER, outer_environment

NODES = ("n1", "n2", "n3", "n4")
_SYSTEM = "/usr/sbin:/sbin"
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")

# preempt_send_user_signal and the two partitions make preemption; JobAcctGather and accounting need other daemons.
_CONFIGURATION = """\
ClusterName=ci
SlurmctldHost=localhost
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobcomp.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
GresTypes=gpu
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=20
InactiveLimit=0
Waittime=0
{nodes}
PartitionName=low Nodes=n[1-4] Default=YES MaxTime=60 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=high Nodes=n[1-4] MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
"""
_NODE = (
    "NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=2 Boards=1 SocketsPerBoard=1 "
    "CoresPerSocket=2 ThreadsPerCore=1 RealMemory=4000 Gres=gpu:2 State=UNKNOWN"
)


class Cluster:
    """The cluster's daemons and what a user on its login node can do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start all daemons and wait until every node is idle."""
        for name in ("state", "log", *(f"spool/{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        nodes = "\n".join(_NODE.format(name=node, port=free_port()) for node in NODES)
        text = _CONFIGURATION.format(folder=self.folder, controller=free_port(), nodes=nodes)
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (self.folder / "gres.conf").write_text("AutoDetect=off\nName=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
        at = self.folder
        self._daemon(
            "munged",
            *("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={at}/munge.sock"),
            *(f"--pid-file={at}/munged.pid", f"--log-file={at}/log/munged.log", f"--seed-file={at}/munge.seed"),
        )
        wait_for(lambda: (at / "munge.sock").exists(), 20, "munged's socket")
        self._daemon("slurmctld", "slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        wait_for(lambda: set(self.node_states().values()) == {"idle"}, 60, "four idle nodes", self.log)

    def start_node(self, node: str) -> None:
        """Start (again) the slurmd of a node."""
        self._daemon(node, "slurmd", "-D", "-N", node)

    def stop(self) -> None:
        """End all daemons and whatever their jobs left running."""
        with contextlib.suppress(Exception):
            self.run("scancel", "--user=root", timeout=10, check=False)
            wait_for(lambda: not self.run("squeue", "-h", timeout=10, check=False)[1].strip(), 20, "an empty queue")
        for daemon in self._daemons.values():
            daemon.kill()
            daemon.wait()
        send(self.processes(), signal.SIGKILL)
        # A killed rank leaves DeepSpeed's 66 MiB in shared memory; pretrain.sbatch takes ports from 20000 to 31999, of
        # which programs beside the tests may have some.
        in_use = _mapped_files()
        for left in Path("/dev/shm").glob("deepspeed_allreduce_buffer_*_[23][0-9][0-9][0-9][0-9]_*"):
            if 20000 <= int(left.name.split("_")[-2]) < 32000 and str(left) not in in_use:
                left.unlink(missing_ok=True)

    def kill_daemon(self, node: str) -> None:
        """Kill the slurmd of a node; its jobs and their slurmstepd live on."""
        self._daemons[node].kill()
        self._daemons[node].wait()

    def kill_node(self, node: str) -> None:
        """What pulling the plug does: slurmd, its slurmstepd and all processes of its jobs, at once."""
        self.kill_daemon(node)
        send(self.processes(node), signal.SIGKILL)

    def processes(self, node: str | None = None) -> list[int]:
        """Process ids of the cluster's daemons and jobs; with `node`, of the steps and jobs on that node."""
        # Each slurmstepd has its slurmd's log open, and what belongs to it are its descendants. Jobs that outlived
        # their slurmstepd are found by their environment.
        log = str(self.folder / "log" / (f"slurmd.{node}.log" if node else ""))
        configuration = f"SLURM_CONF={self.folder}/slurm.conf".encode()
        name = f"SLURMD_NODENAME={node}".encode()
        parents, found = {}, set()
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            pid = int(entry.name)
            try:
                parents[pid] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                environment = (entry / "environ").read_bytes().split(b"\0")
                opened = [os.readlink(link) for link in (entry / "fd").iterdir()]
            except OSError:
                continue
            if configuration in environment and (node is None or name in environment):
                found.add(pid)
            if any(link.startswith(log) for link in opened):
                found.add(pid)
        while True:
            more = {pid for pid, parent in parents.items() if parent in found} - found
            if not more:
                return sorted(found - {os.getpid()})
            found |= more

    def environment(self, **more: str) -> dict[str, str]:
        """What a user's shell on the login node has."""
        kept = {name: value for name, value in outer_environment().items() if not name.startswith(("SLURM", "SBATCH"))}
        return {
            **kept,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            **WITHOUT_COMPILER,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:{_SYSTEM}",
            **more,
        }

    def run(
        self, *command: object, timeout: float = 60, check: bool = True, cwd: Path = ROOT, **env: str
    ) -> tuple[int, str]:
        """Run a command on the login node; (exit status, output)."""
        done = subprocess.run(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            env=self.environment(**env),
            cwd=cwd,
            timeout=PATIENCE * timeout,
        )
        if check:
            assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}"
        return done.returncode, done.stdout

    def submit(self, *arguments: object, **env: str) -> int:
        """sbatch; the job's id."""
        _, printed = self.run("sbatch", "--parsable", *arguments, **env)
        return int(printed.split(";")[0])

    def node_states(self) -> dict[str, str]:
        """The state of each node, as sinfo has it."""
        status, printed = self.run("sinfo", "-h", "-N", "-o", "%N %T", check=False)
        return dict(line.split() for line in printed.splitlines()) if status == 0 else {}

    def job(self, job: object) -> dict[str, str]:
        """`scontrol show job`: JobState, Restarts, NodeList and so on; empty where Slurm knows the job no more."""
        status, printed = self.run("scontrol", "-o", "show", "job", job, check=False)
        if status != 0:
            return {}
        return dict(re.findall(r"(\S+?)=(\S*)", printed.splitlines()[0]))

    def wait_for_job(self, job: object, timeout: float, what: Callable[[], str] | None = None) -> dict[str, str]:
        """Wait until a job has ended for good; its last `job()`."""
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
        wait_for(lambda: self.job(job).get("JobState") in ended, timeout, f"the end of job {job}", what or self.log)
        return self.job(job)

    def log(self) -> str:
        """The last lines of the daemons' logs and of the queue, for a test that failed."""
        parts = [self.run("squeue", "-a", check=False)[1], self.run("sinfo", "-N", check=False)[1]]
        for path in sorted((self.folder / "log").glob("*.log")):
            parts.append(f"--- {path.name}\n" + "\n".join(_without_noise(path)[-25:]))
        return "\n".join(parts)

    def _daemon(self, name: str, *command: str) -> None:
        with (self.folder / "log" / f"{name}.stderr").open("ab") as file:
            self._daemons[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=self.environment(),
                cwd=self.folder,
                start_new_session=True,
            )


@contextlib.contextmanager
def running() -> Iterator[Cluster]:
    """A cluster in a folder of its own, gone afterwards; skips where Slurm is not installed."""
    missing = [name for name in _PROGRAMS if not shutil.which(name, path=f"{os.environ['PATH']}:{_SYSTEM}")]
    if missing:
        pytest.skip(f"Slurm is not installed: no {', '.join(missing)} (apt-get install slurm-wlm munge)")
    if os.geteuid() != 0:
        pytest.skip("a Slurm cluster on one host needs root")
    with _alone():
        yield from _cluster()


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One cluster at a time on this host: each has jobs with the numbers 1, 2 and so on, and ports made of them."""
    with Path(tempfile.gettempdir(), "ds_quant-slurm-tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _cluster() -> Iterator[Cluster]:
    # Not below pytest's folders: the sockets of the steps are in it, whose paths may have 108 bytes.
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(holds: Callable[[], object], timeout: float, what: str, explain: Callable[[], str] | None = None) -> None:
    """Wait until `holds()`; after PATIENCE times `timeout` an assertion with `what` and what `explain()` tells."""
    timeout *= PATIENCE
    deadline = time.monotonic() + timeout
    while not holds():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout:.0f} s for {what}\n{explain() if explain else ''}")
        time.sleep(0.2)


def send(pids: Iterable[int], signum: int) -> None:
    """Send a signal to those of the processes that are still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)


def _without_noise(path: Path) -> list[str]:
    lines = path.read_text(errors="replace").splitlines()
    return [line for line in lines if "pmix" not in line and "CPU frequency" not in line]


def _mapped_files() -> set[str]:
    """The files of shared memory that living processes have mapped."""
    found: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            found.update(re.findall(r"/dev/shm/\S+", maps.read_text()))
    return found
