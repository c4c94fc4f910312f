"""The process: ranks, device and memory."""

from __future__ import annotations

import gc
import os
import re
import resource
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from survival.errors import LaunchError

from ds_quant.base.process_group import RANK_VARIABLES, become_one_rank


def ensure_process_group_variables() -> None:
    """Make a plain `python pretrain.py` a job of one process. A launcher's variables are kept, and srun's are read."""
    if any(name in os.environ for name in RANK_VARIABLES):
        return
    if "SLURM_STEP_NUM_TASKS" in os.environ:
        os.environ.update(_of_slurm_step())
        return
    become_one_rank()


def _of_slurm_step() -> dict[str, str]:
    """The variables that torch needs in a task started by srun; `deepspeed --launcher slurm` sets none of them.

    MASTER_ADDR and MASTER_PORT are kept if they are set.
    """
    slurm = os.environ
    return {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": slurm["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        # "2(x3),1": tasks of each node. The first number is used; nodes may have different numbers.
        "LOCAL_WORLD_SIZE": re.split(r"[(,]", slurm.get("SLURM_STEP_TASKS_PER_NODE", "1"))[0],
        "MASTER_ADDR": slurm.get("MASTER_ADDR") or _first_host(slurm["SLURM_STEP_NODELIST"]),
        # Steps of one job may run at the same time, so both numbers count; the range is free for programs.
        "MASTER_PORT": slurm.get("MASTER_PORT")
        or str(20000 + (int(slurm.get("SLURM_JOB_ID", 0)) * 16 + int(slurm.get("SLURM_STEP_ID", 0)) % 16) % 10000),
    }


def _first_host(nodes: str) -> str:
    """The first node of a list in Slurm's notation, such as node[3-5,8]: its name or its address in Slurm."""
    name = _scontrol("show", "hostnames", nodes).split()[0]
    try:
        socket.gethostbyname(name)
    except OSError:
        # Slurm may use node names that do not resolve elsewhere.
        address = re.search(r"NodeAddr=(\S+)", _scontrol("--oneliner", "show", "node", name))
        return address[1] if address else name
    return name


def _scontrol(*arguments: str) -> str:
    command = ["scontrol", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise LaunchError(
            f"The first node of this Slurm step is not known, since `{' '.join(command)}` failed ({error}). "
            "Set MASTER_ADDR to the name or address of the node where rank 0 runs."
        ) from error


def world_size() -> int:
    """The number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", os.environ.get("OMPI_COMM_WORLD_SIZE", "1")))


def without_accelerator() -> bool:
    """Whether to train on the CPU. Tells DeepSpeed too, so call it before deepspeed is imported."""
    import torch

    if os.environ.get("DS_ACCELERATOR", "").lower() == "cpu" or not torch.accelerator.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        return True
    return False


@contextmanager
def imports_left_alone() -> Iterator[None]:
    """Keep the garbage collector away from what is imported within, then and later.

    Those are 800,000 objects, which live as long as the process. Going through them takes half a second, and DeepSpeed
    asks for it several times.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def join_process_group(timeout_seconds: float) -> None:
    """Join the other ranks. Collectives that take longer than the time-out fail."""
    import deepspeed

    # NCCL's first collective uses the current device.
    deepspeed.get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", "0")))
    deepspeed.init_distributed(timeout=timedelta(seconds=timeout_seconds))


def is_bf16_fast() -> bool:
    """Whether the device that this process trains on multiplies bf16 fast."""
    import torch

    from ds_quant.kernels.bf16_units import multiplies_bf16_fast

    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.accelerator.is_available():
        return multiplies_bf16_fast(torch.device("cpu"))
    return multiplies_bf16_fast(torch.accelerator.current_accelerator() or torch.device("cpu"))


def peak_memory_bytes() -> int:
    """Peak memory of this process: on its accelerator if it trains on one, otherwise resident memory."""
    import torch

    if os.environ.get("DS_ACCELERATOR") != "cpu" and torch.accelerator.is_available():
        return int(torch.accelerator.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
