"""How often does gloo overlook that a peer was killed, and how long does the survivor live? Real kills, many times.

    python tests/launchers/overlooked_kills.py --kills 300 [--seed 1]

Two ranks run collectives of all kinds under `survival.ending`. Both are stopped (SIGSTOP) at a time drawn from the
seed, rank 1 is killed, and rank 0 goes on. A survivor that its broken connections end takes some seconds at most; one
that waits on is ended by its lifeline. Prints a line for each of these, and a summary; ends with 1 if a survivor did
not end at all.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "launchers"))
from survival import lifeline
from survival.control import Control
from survival.ending import ending, take_folder
from survival.errors import RunEnded

from ds_quant.base.process_group import free_port

TIMEOUT = 1800.0
"""Of the groups, in seconds: DeepSpeed's."""
LONGEST = 2 * lifeline.GRACE_SECONDS


def work(rank: int, folder: Path, port: int) -> None:
    """Collectives until something ends them."""
    log = os.open(folder / f"log-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
    control = Control(TIMEOUT)
    lease = take_folder(folder / "run", control)
    large, parts = torch.ones(200_000), [torch.empty(50_000) for _ in range(2)]
    with ending(lease, control):
        (folder / f"ready-{rank}").touch()
        while True:
            dist.all_reduce(large)
            control.agree()
            dist.all_gather(parts, torch.ones(50_000))
            control.gather("as Python objects")
            dist.broadcast(large, 0)
            dist.barrier()


def fork(run: Callable[[], None]) -> int:
    """The process that runs it, and ends with 4 where `survival` ended it."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        run()
    except RunEnded as end:
        status = end.exit_status
    finally:
        os._exit(status)


def kill_once(folder: Path, draw: random.Random) -> float | None:
    """Seconds that the survivor lived, None if it did not end."""
    port = free_port()
    first, second = (fork(lambda rank=rank: work(rank, folder, port)) for rank in range(2))  # type: ignore[misc]
    while not all((folder / f"ready-{rank}").exists() for rank in range(2)):
        time.sleep(0.01)
    time.sleep(draw.uniform(0.05, 0.3))
    for pid in draw.sample([first, second], 2):
        os.kill(pid, signal.SIGSTOP)
        time.sleep(draw.choice([0.0, draw.uniform(0, 0.02)]))
    time.sleep(draw.uniform(0, 0.1))
    os.kill(second, signal.SIGKILL)
    time.sleep(draw.choice([0.0, 0.05]))
    os.kill(first, signal.SIGCONT)
    os.waitpid(second, 0)
    begin = time.monotonic()
    while time.monotonic() - begin < LONGEST:
        if os.waitpid(first, os.WNOHANG)[0]:
            return time.monotonic() - begin
        time.sleep(0.02)
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    overlooked = lived_on = 0
    longest = 0.0
    for kill in range(args.kills):
        with tempfile.TemporaryDirectory() as folder:
            seconds = kill_once(Path(folder), draw)
            ended = "did not end" if seconds is None else f"ended after {seconds:.1f} s"
            lived_on += seconds is None
            longest = max(longest, seconds or 0.0)
            if "has ended, or its node does not answer" in (Path(folder) / "log-0").read_text():
                overlooked += 1
                print(f"kill {kill}: overlooked by gloo, {ended}", flush=True)
            elif seconds is None:
                print(f"kill {kill}: {ended}:\n{(Path(folder) / 'log-0').read_text()}", flush=True)
    print(
        f"torch {torch.__version__}: gloo overlooked {overlooked} of {args.kills} kills; {lived_on} survivors did not "
        f"end, the others within {longest:.1f} s"
    )
    return 1 if lived_on else 0


if __name__ == "__main__":
    sys.exit(main())
