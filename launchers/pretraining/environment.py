"""The process: ranks, device, and how much is said on the terminal."""

from __future__ import annotations

import logging
import os
import socket
import sys
import warnings
from pathlib import Path

_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def ensure_process_group_variables() -> None:
    """Make a plain `python pretrain.py` a job of one process; a launcher's own variables stay."""
    if any(name in os.environ for name in _RANK_VARIABLES):
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(port))


def let_threads_sleep() -> None:
    """Make OpenMP's idle threads wait instead of spin; must be called before torch is imported.

    Where the cores are shared with anything else, spinning threads wait for ones that have no core: ten times slower
    measured, and nothing lost on an idle machine.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def rank() -> int:
    """The number of this process among all."""
    return int(os.environ.get("RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0")))


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", os.environ.get("OMPI_COMM_WORLD_SIZE", "1")))


def without_accelerator() -> bool:
    """Whether to train on the CPU; tells DeepSpeed too, so it must be called before deepspeed is imported."""
    import torch

    if os.environ.get("DS_ACCELERATOR", "").lower() == "cpu" or not torch.accelerator.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        return True
    return False


def quiet(*, verbose: bool) -> None:
    """Keep DeepSpeed's and the Trainer's chatter off the terminal unless it was asked for."""
    if verbose:
        return
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # accelerate chooses as many threads as there are cores for each rank, and warns that it did.
    warnings.filterwarnings("ignore", message="OMP_NUM_THREADS/MKL_NUM_THREADS unset")
    import datasets
    from transformers.utils import logging as transformers_logging

    # The bars of saving a model cut through the one of training, which is not among these.
    transformers_logging.disable_progress_bar()
    if rank() != 0:
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity_error()


def say(message: str) -> None:
    """Print a line, once in the whole job."""
    if rank() == 0:
        print(message, flush=True)


def complain(message: str) -> None:
    """Print an error, once in the whole job."""
    if rank() == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)


def leave_process_group() -> None:
    """End the process group: gloo's threads may abort the process at exit where it is left to them."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    # DeepSpeed leaves 66 MiB a rank in shared memory for good.
    name = f"deepspeed_allreduce_buffer_*_{os.environ.get('MASTER_PORT')}_{os.environ.get('RANK')}"
    for left in Path("/dev/shm").glob(name):
        left.unlink(missing_ok=True)
