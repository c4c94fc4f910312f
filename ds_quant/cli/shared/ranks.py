"""Runs a program as one process a rank, over loopback or over a link, and stops all of them at the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from ds_quant.base.process_group import free_port
from ds_quant.cli.shared.signals import hold_signals, raise_on_signals

_SHOWN_LINES = 15


class RanksError(ValueError):
    """A rank failed, or took too long; the message has its last lines."""


class Wire(Protocol):
    """A network of its own for each rank."""

    def environment(self) -> dict[str, str]:
        """Variables that all ranks need to meet on it."""

    def within(self, rank: int, command: list[str]) -> list[str]:
        """What runs `command` where this rank's network is."""


def run_ranks(
    command: list[str], *, ranks: int, link: Wire | None, environment: Mapping[str, str], timeout: float
) -> None:
    """Run `command` in Python on every rank, each within its namespace if there is a link.

    RanksError with the last lines of the first rank that fails, or where they take more than `timeout` seconds.
    """
    # Also for namespaces, where any would do: DeepSpeed's files in shared memory are named after it.
    port = free_port()
    shared = {
        **os.environ,
        "OMP_WAIT_POLICY": "PASSIVE",
        # A ninja from outside this environment would rebuild DeepSpeed's op, and this one would rebuild it again later.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONWARNINGS": "ignore",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "WORLD_SIZE": str(ranks),
        "MASTER_PORT": str(port),
        **({"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"} if link is None else link.environment()),
        **environment,
    }
    # With a link, every rank is a node of its own.
    local = range(ranks) if link is None else [0] * ranks
    processes: list[subprocess.Popen] = []
    with tempfile.TemporaryDirectory() as folder, raise_on_signals():
        logs = [Path(folder, f"rank-{rank}.log") for rank in range(ranks)]
        try:
            for rank in range(ranks):
                words = [sys.executable, *command]
                own = {"RANK": str(rank), "LOCAL_RANK": str(local[rank]), "LOCAL_WORLD_SIZE": str(max(local) + 1)}
                with logs[rank].open("wb") as log:
                    processes.append(
                        subprocess.Popen(
                            words if link is None else link.within(rank, words),
                            env={**shared, **own},
                            stdin=subprocess.DEVNULL,
                            stdout=log,
                            stderr=subprocess.STDOUT,
                            start_new_session=True,
                        )
                    )
            _wait(processes, logs, command, timeout)
        finally:
            with hold_signals():
                _end(processes)
                # DeepSpeed leaves 66 MiB a rank in shared memory, named after its port, where it is killed.
                for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
                    left.unlink(missing_ok=True)


def _wait(processes: list[subprocess.Popen], logs: list[Path], command: list[str], timeout: float) -> None:
    end = time.monotonic() + timeout
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code:
                raise RanksError(f"{' '.join(command)}: rank {rank} ended with {code}:\n{_last_lines(logs[rank])}")
        if None not in codes:
            return
        if time.monotonic() > end:
            rank = codes.index(None)
            raise RanksError(
                f"{' '.join(command)}: rank {rank} still ran after {timeout:.0f} s:\n{_last_lines(logs[rank])}"
            )
        time.sleep(0.05)


def _end(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    for process in processes:
        process.wait()


def _last_lines(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-_SHOWN_LINES:])
