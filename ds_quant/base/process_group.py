"""Process groups: a single rank without a launcher, free ports, and a clean shutdown."""

import os
import random
import socket
import sys
from collections import deque
from pathlib import Path

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""Any of these variables shows that a launcher started this process."""

_HELD_PORTS: deque[socket.socket] = deque(maxlen=64)
"""Sockets that keep others off the ports that `free_port` has given; the oldest are let go."""


def free_port() -> int:
    """A TCP port for a program that is started next, by this process or as its child.

    On Linux it stays reserved while this process lives, or until 64 more were asked for: a program may import for a
    minute before it listens, and meanwhile another could be given the same port. Servers that set SO_REUSEADDR, as
    torch's do, can listen on it; who asks for any free port does not get it.

    From 12000 to 19999: jobs of Slurm take theirs from 20000 on, by their number, and ports above 32767 may be assigned
    to any outgoing connection before that program starts.

    Raises:
        OSError: a hundred ports in a row were taken.
    """
    for port in random.SystemRandom().sample(range(12_000, 20_000), 100):
        probe = socket.socket()
        try:
            probe.bind(("", port))
        except OSError:
            probe.close()
            continue
        if sys.platform == "linux":
            # Not before it is bound: two that reserve could have the same port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _HELD_PORTS.append(probe)
        else:
            probe.close()
        return port
    raise OSError("found no free port between 12000 and 19999")


def become_one_rank() -> None:
    """Set the variables by which torch and DeepSpeed take this process for the only rank; a chosen address stays."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(free_port()))


def leave_process_group() -> None:
    """Destroy the process group of a rank that has finished, if there is one.

    Gloo's threads may still hold the tensors of the last collective. A thread that frees one while the interpreter ends
    aborts the process ("terminate called without an active exception", PyTorch issue 190489); this waits for them. Not
    for a rank that fails: its peers may never answer what it has begun.
    """
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    # DeepSpeed leaves 66 MiB a rank in shared memory for good.
    name = f"deepspeed_allreduce_buffer_*_{os.environ.get('MASTER_PORT')}_{os.environ.get('RANK')}"
    for left in Path("/dev/shm").glob(name):
        left.unlink(missing_ok=True)
