"""How much a process says on the terminal, as one of several ranks or alone."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path


def let_threads_sleep() -> None:
    """Make OpenMP's idle threads wait instead of spin; must be called before torch is imported.

    Where the cores are shared with anything else, spinning threads wait for ones that have no core: ten times slower
    measured, and nothing lost on an idle machine.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def rank() -> int:
    """The rank of this process in its job, from the launcher's variables; 0 without a launcher."""
    return int(os.environ.get("RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0")))


def quiet(*, verbose: bool) -> None:
    """Keep DeepSpeed's and the Trainer's chatter off the terminal unless it was asked for."""
    if verbose:
        return
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # accelerate chooses as many threads as there are cores for each rank, and warns that it did.
    warnings.filterwarnings("ignore", message="OMP_NUM_THREADS/MKL_NUM_THREADS unset")
    from transformers.utils import logging as transformers_logging

    # The bars of saving a model cut through the one of training, which is not among these.
    transformers_logging.disable_progress_bar()
    if rank() != 0:
        try:
            import datasets
        except ImportError:  # an extra: what is not there says nothing
            return
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity_error()


def say(message: str) -> None:
    """Print a line, once in the whole job."""
    if rank() == 0:
        print(message, flush=True)


def complain(message: str, *, everywhere: bool = False) -> None:
    """Print an error: once in the whole job, or on every rank that meets one of its own."""
    if everywhere or rank() == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)


def words_of_command() -> list[str]:
    """How this program was started, as a user would write it."""
    program = Path(sys.argv[0])
    start = ["ds_quant"] if program.name == "ds_quant" else ["python", str(program)]
    return [*start, *sys.argv[1:]]
