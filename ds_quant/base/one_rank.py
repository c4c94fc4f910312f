"""A process that no launcher started, as a job of one rank; and ports for processes that meet."""

import contextlib
import os
import random
import socket

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""By any of these a process knows that a launcher started it."""


def free_port() -> int:
    """A TCP port for a program that is started next.

    Below 32768: from there on systems hand out ports to any connection, and one may begin before that program does.

    Raises:
        OSError: a hundred ports in a row were taken.
    """
    for port in random.SystemRandom().sample(range(12_000, 29_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise OSError("found no free port between 12000 and 29000")


def become_one_rank() -> None:
    """Set the variables by which torch and DeepSpeed take this process for the only rank; a chosen address stays."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(free_port()))
