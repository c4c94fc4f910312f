"""Dry runs of jobs, one process each: `python -m ds_quant.planning.worker`, told and answering in lines of JSON.

A process that has imported everything forks for each job: DeepSpeed and torch.distributed keep their view of
the world in globals, and a world of thousands of ranks must leave none of it behind.
"""

import dataclasses
import gc
import json
import os
import signal
import sys
import traceback
from typing import Any, TextIO

import torch
from torch import distributed as torch_dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from ds_quant.config import ConfigError
from ds_quant.engine import dry_start
from ds_quant.kernels import native
from ds_quant.kernels.integer_units import integer_units
from ds_quant.planning import models
from ds_quant.planning.dry_run import DryRun
from ds_quant.planning.job import Job, Outcome, run_job
from ds_quant.planning.ledger import Ledger


def dry_run(job: Job, node_size: int, offloaded: tuple[str, ...] = ()) -> Outcome:
    """The outcome of a job without its arithmetic. Once in a process: it makes the process group.

    Raises ConfigError as training would, and for what has no size without values.
    """
    os.environ |= {
        "RANK": str(job.rank),
        "LOCAL_RANK": str(job.rank % node_size),
        "WORLD_SIZE": str(job.world_size),
        "LOCAL_WORLD_SIZE": str(min(node_size, job.world_size)),
    }
    torch_dist.init_process_group("fake", store=FakeStore(), rank=job.rank, world_size=job.world_size)
    ledger = Ledger()
    with dry_start.dry_start(job.config), DryRun(), ledger:
        return run_job(job, ledger, offloaded)


def _child(request: dict[str, Any], answer: int) -> None:
    try:
        found = dry_run(Job(**request["job"]), request["node_size"], tuple(request["offloaded"]))
        result: dict[str, Any] = {"outcome": dataclasses.asdict(found)}
    except ConfigError as error:
        result = {"refused": str(error)}
    except Exception:
        result = {"failed": traceback.format_exc()}
    with os.fdopen(answer, "w") as file:
        json.dump(result, file)


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer each line until there are no more."""
    native.skip_arithmetic()
    integer_units(torch.device("cpu"))  # it computes
    models.preload()
    dry_start.preload()
    gc.freeze()  # a collection in a child would go through all modules, and take as long as the rest of a small job
    for line in requests:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            _child(json.loads(line), writing)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as file:
            text = file.read()
        _, status = os.waitpid(child, 0)
        if not text:
            text = json.dumps({"failed": f"the dry run ended with status {status} and no answer (out of memory?)"})
        answers.write(text + "\n")
        answers.flush()


def main() -> None:
    # DeepSpeed prints to stdout.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
