"""A gather of weights in many rounds, in one of which the encoding fails on one rank: `weight_failure.py OUTPUT`."""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
from torch import distributed as dist

from ds_quant.comm import weight_gather
from ds_quant.comm.buffers import Buffers
from ds_quant.comm.message_gather import GroupOfNodes
from ds_quant.comm.statistics import Statistics
from ds_quant.comm.weight_gather import WeightGather
from ds_quant.comm.weight_layout import Coding, Weight, build

TIMEOUT = 60
FAILING_RANK, FAILING_ROUND = 1, 3


def main(output):
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    flat = torch.randn(64 * 128 * world_size)
    weight = Weight("w", 0, (64 * world_size, 128), Coding(8, "row"))
    layout = build([weight], flat.numel(), world_size, 4, round_numel=1024)
    assert len(layout.rounds) == 8
    gather = WeightGather(layout, GroupOfNodes(dist.group.WORLD, None), Buffers(), Statistics())
    gather.gather(flat)
    encode, calls = weight_gather.encode, []

    def failing(*arguments):
        calls.append(arguments)
        if rank == FAILING_RANK and len(calls) > FAILING_ROUND:
            raise MemoryError("no memory for this round")
        encode(*arguments)

    dist.barrier()
    begin, error = time.monotonic(), None
    with mock.patch.object(weight_gather, "encode", failing):
        try:
            gather.gather(flat)
        except (MemoryError, RuntimeError) as found:
            error = f"{type(found).__name__}: {found}"
    report = {"error": error, "seconds": time.monotonic() - begin, "rounds": len(calls)}
    Path(f"{output}.{rank}").write_text(json.dumps(report))
    os._exit(0)  # as a rank ends that nobody catches the error of, but for its status


if __name__ == "__main__":
    main(sys.argv[1])
