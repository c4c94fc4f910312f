"""What a layer saves that multiplies the codes of a fetched weight: `python -m benchmarks.weight_reuse`.

One process with one thread does what one of several ranks does with a weight in bf16 that has arrived in 8 bits at ZeRO
stage 3: it writes the values, and has the codes or makes them of the values, once or, for a forward and a backward,
twice. Both take turns; processor seconds are compared, which other jobs do not move much.
"""

from __future__ import annotations

import time

import torch

from benchmarks.timing import ratios, spread, take_turns
from ds_quant.cli.shared.tables import environment
from ds_quant.comm.weight_fetch import PartitionedWeight
from ds_quant.comm.weight_layout import Coding
from ds_quant.kernels.int8 import ops
from ds_quant.numerics.integer import symmetric_levels

SHAPES = ((512, 512), (1536, 512), (4096, 1024))
RANKS = (2, 8)
ROUNDS, WARM_UP = 101, 5


def main() -> None:
    """Measure every shape, and print a line for each."""
    torch.set_num_threads(1)
    where = environment(torch.device("cpu"))
    print(f"{where['processor']}, 1 thread, torch {where['torch']}, {where['commit']}")
    for shape in SHAPES:
        for ranks in RANKS:
            _measure(shape, ranks)


def _measure(shape: tuple[int, int], ranks: int) -> None:
    values = torch.randn(shape).bfloat16()
    weights = [PartitionedWeight(shape, Coding(8, "row"), values.dtype, ranks, rank) for rank in range(ranks)]
    parts, shared = values.flatten().chunk(ranks), torch.empty(0)
    slots = torch.empty(ranks, weights[0].slot_bytes, dtype=torch.uint8)
    for weight, part, slot in zip(weights, parts, slots, strict=True):
        weight.encode(part, shared, slot)

    def quantizing(times: int) -> None:
        flat, _ = weights[0].decode(slots, parts[0], shared)
        for _ in range(times):
            ops.quantize_rows(flat.view(shape), symmetric_levels(8))

    contenders = {
        "codes": lambda: weights[0].decode(slots, parts[0], shared, with_codes=True),
        "once": lambda: quantizing(1),
        "twice": lambda: quantizing(2),
    }
    seconds = take_turns(
        contenders, rounds=ROUNDS, warm_up=WARM_UP, device=torch.device("cpu"), clock=time.process_time
    )
    took = spread(seconds["codes"]).p50 * 1e9 / values.numel()
    found = {base: ratios(seconds, base)["codes"] for base in ("once", "twice")}
    of = ", ".join(f"{each.p50:.2f} ({each.p20:.2f}-{each.p80:.2f}) of {base}" for base, each in found.items())
    print(f"{shape[0]} x {shape[1]}, {ranks} ranks: {took:.2f} ns an element, {of}")


if __name__ == "__main__":
    main()
