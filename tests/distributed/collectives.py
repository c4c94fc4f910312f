"""Quantized collectives on real ranks, beside torch's in full precision and beside their definition.

    torchrun collectives.py OUTPUT
    python collectives.py OUTPUT RANK      one rank of 1024, the others are torch's fake process group

Writes what each rank found, as JSON, to OUTPUT.RANK; the test looks at it.
"""

import datetime
import gc
import json
import os
import sys
import time
from pathlib import Path

import torch
from collectives_definition import as_sent, bound, expected_of
from counted_wire import CountedWire, check_bytes
from expectations import expecting, same_on_all
from torch import distributed as dist
from weight_gathers import check_of_many, check_two_levels

from ds_quant.base.errors import ConfigError
from ds_quant.comm import all_reduce, reduce_scatter
from ds_quant.comm.exchange import Call
from ds_quant.comm.layout import Span, cut_each, cut_evenly
from ds_quant.comm.reducer import STREAM, Reducer, wire_format
from ds_quant.config import GradientCommunicationConfig
from ds_quant.numerics import wire
from ds_quant.numerics.random import fold_words

SIZES = (1, 3, 255, 256, 257, 1000, 4097)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def values(size, dtype, rank, seed):
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return (torch.randn(size, generator=generator) * 10 ** torch.rand(size, generator=generator)).to(dtype)


def check_memory(expect):
    """Later calls of the same kind take the memory of the first."""
    reducer = Reducer(GradientCommunicationConfig.parse({"bits": 4}))
    kept = []
    for _ in range(3):
        reducer.all_reduce([torch.ones(5000)], [Span("", 0, 0, 0, 5000)], Call(1.0))
        free = reducer.channel.buffers._free
        kept.append(sorted(buffer.data_ptr() for buffers in free.values() for buffer in buffers))
    expect(kept[0] == kept[1] == kept[2], "buffers", kept)
    expect(len(kept[0]) == (3 if reducer.world_size > 1 else 0), "a message, what is received, what is gathered", kept)


def cases(world_size):
    for number, (bits, rotation, rounding) in enumerate(
        [(8, "none", "nearest"), (4, "none", "nearest"), (4, "hadamard", "nearest"), (8, "none", "stochastic")]
    ):
        for size in SIZES:
            yield number, bits, rotation, rounding, size, DTYPES[(number + size) % len(DTYPES)]


NAMED = (
    {"format": "fp4_e2m1", "block_size": 32},
    {"format": "mxfp4", "scale_rule": "up", "rounding": "stochastic"},
    {"format": "nvfp4", "scale_rule": "four_six"},
    {"format": "nvint4", "rotation": "hadamard"},
)


def check_named(expect, keys_of_next_call):
    """Formats with a name: the bits of the definition, on all ranks the same."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size == 1:
        return
    for number, options in enumerate(NAMED):
        fmt = wire_format(GradientCommunicationConfig.parse(options))
        for size in (3, 257, 1000):
            dtype, what = DTYPES[(number + size) % 3], (*options.values(), size)
            shares = [values(size, dtype, other, 90 + number) for other in range(world_size)]
            result, keys = shares[rank].clone(), keys_of_next_call({"rounding": "nearest", **options})
            all_reduce(result, dist.ReduceOp.AVG, **options)
            pieces = cut_evenly([Span("", 0, 0, 0, size)], fmt, world_size)
            wanted = expected_of(shares, pieces, fmt, False, factor=1.0 / world_size, keys=keys)[rank]
            expect(torch.equal(result, wanted), "all_reduce, bits", *what)
            expect(same_on_all(result), "ranks differ", *what)
            whole = [torch.cat([share] * world_size) for share in shares]
            part, keys = torch.empty(size, dtype=dtype), keys_of_next_call({"rounding": "nearest", **options})
            reduce_scatter(part, whole[rank], **options)
            pieces = cut_each([Span("", 0, 0, 0, size * world_size)], world_size)
            wanted = expected_of(whole, pieces, fmt, False, factor=1.0, keys=keys, output_dtype=dtype)[rank]
            expect(torch.equal(part, wanted), "reduce_scatter, bits", *what)


def main(output):
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    report = {"checked": 0, "wrong": []}
    expect = expecting(report)

    torch.manual_seed(7)  # of all ranks: the seeds of others are needed here
    calls = {}

    def keys_of_next_call(options):
        """The random bits of each rank; calls are numbered from 1, for each group and settings."""
        settings = tuple(options.values())
        calls[settings] = calls.get(settings, 0) + 1
        if options["rounding"] == "nearest":
            return [None] * world_size
        return [
            fold_words(torch.initial_seed(), calls[settings], 0, other + 1, STREAM << 32) for other in range(world_size)
        ]

    check_named(expect, keys_of_next_call)
    hierarchical = [False] + [m for m in (2,) if world_size % m == 0 and world_size > m]
    for node in hierarchical[1:]:
        check_two_levels(expect, node, same_on_all)
    for node in hierarchical:
        for number, bits, rotation, rounding, size, dtype in cases(world_size):
            options = {"bits": bits, "block_size": 32 if size < 1000 else 256, "rotation": rotation}
            options |= {"rounding": rounding, "hierarchical": node}
            what = (node, bits, rotation, rounding, size, dtype)
            # A rank's share in few bits, or that of a node: the sum of the shares bounds either.
            shares = [values(size, dtype, other, number).double() for other in range(world_size)]
            exact = sum(shares)
            own = values(size, dtype, rank, number)
            ulp = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
            ulp = ulp * (world_size if node else 1)  # the node's sum is rounded to the dtype as well
            # A stochastic step is up to twice a rounded one.
            factor = 2 if rounding == "stochastic" else 1
            limit = factor * bound(shares, bits, options["block_size"], True, rotation)
            limit += ulp * float(sum(share.abs().max() for share in shares))
            if world_size == 1:
                limit = 1e-6 * float(exact.abs().max())
            fmt = wire.WireFormat(bits, options["block_size"], rotation)
            simulator = (size + number) % world_size  # one rank compares, each in turn
            for op, scale in ((dist.ReduceOp.SUM, 1.0), (dist.ReduceOp.AVG, 1.0 / world_size)):
                result = own.clone()
                keys = keys_of_next_call(options)
                handle = all_reduce(result, op, async_op=True, **options)
                handle.wait()
                error = (result.double() - exact * scale).abs().max().item()
                expect(error <= limit * scale, "all_reduce", *what, op, error, limit * scale)
                expect(same_on_all(result), "ranks differ", *what)
                expect(result.dtype == dtype, "dtype", *what)
                if rank == simulator:
                    inputs = [as_sent(values(size, dtype, other, number)) for other in range(world_size)]
                    pieces = cut_evenly([Span("", 0, 0, 0, size)], fmt, world_size)
                    wanted = expected_of(inputs, pieces, fmt, node, factor=scale, keys=keys)[rank]
                    expect(torch.equal(result, wanted.to(dtype)), "all_reduce, bits", *what, op)
            whole = torch.cat([values(size, dtype, rank, number + 50 + part) for part in range(world_size)])
            exact = sum(values(size, dtype, other, number + 50 + rank).double() for other in range(world_size))
            part = torch.empty(size, dtype=dtype)
            keys = keys_of_next_call(options)
            reduce_scatter(part, whole, dist.ReduceOp.AVG, **options)
            shares = [
                torch.cat([values(size, dtype, other, number + 50 + p) for p in range(world_size)]).double()
                for other in range(world_size)
            ]
            if rank == simulator:
                inputs = [as_sent(share.to(dtype)) for share in shares]
                pieces = cut_each([Span("", 0, 0, 0, whole.numel())], world_size)
                wanted = expected_of(
                    inputs, pieces, fmt, node, factor=1 / world_size, keys=keys, output_dtype=as_sent(part).dtype
                )[rank]
                expect(torch.equal(part, wanted.to(dtype)), "reduce_scatter, bits", *what)
            limit = factor * bound(shares, bits, options["block_size"], False, rotation)
            limit += ulp * float(sum(share.abs().max() for share in shares))
            error = (part.double() - exact / world_size).abs().max().item()
            expect(error <= limit / world_size, "reduce_scatter", *what, error, limit / world_size)

    # Views: strides are kept, what lies between is left alone.
    base = torch.zeros(6, 8)
    view = base[:, ::2]
    view.fill_(rank + 1.0)
    all_reduce(view)
    expect(torch.allclose(view, torch.full_like(view, world_size * (world_size + 1) / 2), rtol=1e-2), "strided")
    expect(not base[:, 1::2].any(), "strided neighbours")

    # So may leaves of autograd be, and in inference mode; buffers are good for both.
    leaf = torch.zeros(64, 64).t().requires_grad_()
    with torch.inference_mode():
        metric = torch.full((5000,), rank + 1.0)
        all_reduce(metric)
    all_reduce(leaf[:, ::2].detach())
    all_reduce(leaf)
    expect(not leaf.any() and leaf.requires_grad, "leaf")
    expect(torch.allclose(metric, torch.full_like(metric, world_size * (world_size + 1) / 2), rtol=1e-2), "inference")

    # Non-finite values arrive, on all ranks, and spoil no other block.
    for bad in (float("inf"), float("-inf"), float("nan")):
        for bits in (8, 4):
            result = torch.ones(1024)
            if rank == world_size - 1:
                result[300] = bad
            all_reduce(result, bits=bits, block_size=32)
            expect(not result[300].isfinite(), "non-finite", bad, bits)
            expect(result[:256].isfinite().all() and result[352:].isfinite().all(), "non-finite spreads", bad, bits)

    zeros = torch.zeros(700)
    all_reduce(zeros, bits=4)
    expect(not zeros.any(), "zeros")
    empty = torch.zeros(0)
    all_reduce(empty)

    # Two under way at once, waited for in order.
    first, second = torch.full((5000,), rank + 1.0), torch.full((300,), 2.0 * (rank + 1))
    handles = [all_reduce(first, async_op=True), all_reduce(second, async_op=True)]
    for handle in handles:
        handle.wait()
    total = world_size * (world_size + 1) / 2
    expect(torch.allclose(first, torch.full_like(first, total), rtol=1e-2), "two at once, first")
    expect(torch.allclose(second, torch.full_like(second, 2 * total), rtol=1e-2), "two at once, second")

    # Ranks that disagree are told, all of them.
    if world_size > 1:
        odd_ones = [{"numel": 100}, {"bits": 4}, {"rounding": "stochastic"}, {"dtype": torch.bfloat16}]
        odd_ones += [{"block_size": 32}, {"op": dist.ReduceOp.AVG}]
        odd_ones += [{"hierarchical": m} for m in hierarchical if m]  # whose groups the others would not make
        for odd in odd_ones:
            for call in ("all_reduce", "reduce_scatter"):
                settings = {"numel": 77, "bits": 8, "block_size": 64, "dtype": torch.float32} | (
                    odd if rank == 1 else {}
                )
                numel, dtype = settings.pop("numel"), settings.pop("dtype")
                try:
                    if call == "all_reduce":
                        all_reduce(torch.ones(numel, dtype=dtype), **settings)
                    else:
                        shape = (numel * world_size,)
                        reduce_scatter(torch.ones(numel, dtype=dtype), torch.ones(shape, dtype=dtype), **settings)
                    expect(False, "disagreement not found", call, odd)
                except ConfigError as error:
                    expect("rank 1" in str(error) and "same on all ranks" in str(error), "message", error)
        if world_size % 2:
            try:
                all_reduce(torch.ones(10), hierarchical=2)
                expect(False, "half a node")
            except ConfigError as error:
                expect("hierarchical: got 2; allowed: a divisor" in str(error), "message", error)
        everybody = dist.new_group()
        own_group = dist.new_group([0, 1])
        if rank < 2:
            result = torch.full((64,), rank + 1.0)
            all_reduce(result, group=own_group)
            expect(torch.allclose(result, torch.full((64,), 3.0), rtol=1e-2), "group of two")
        dist.barrier(everybody)
        for node in hierarchical[1:]:  # whose groups are made by ranks that have been in different numbers of groups
            result = torch.full((64,), rank + 1.0)
            all_reduce(result, hierarchical=node, group=everybody)
            expect(torch.allclose(result, torch.full((64,), total), rtol=1e-2), "nodes of a later group", node)

        # A rank that does not come is missed after the group's time-out: an error, no hang.
        impatient = dist.new_group([0, 1], timeout=datetime.timedelta(seconds=2))
        if rank < 2:
            all_reduce(torch.ones(5000), group=impatient)
            if rank == 0:
                begin = time.monotonic()
                try:
                    all_reduce(torch.ones(5000), group=impatient)
                    expect(False, "alone")
                except RuntimeError as error:
                    expect("imed out" in str(error), "time-out", error)
                    expect(1 < time.monotonic() - begin < 60, "time-out", time.monotonic() - begin)
        dist.barrier(everybody)

    check_bytes(expect, world_size, rank, world_size * 100 * 256)  # shares are even to the block
    check_memory(expect)

    Path(f"{output}.{rank}").write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may outlive the group


def main_of_many(output, rank, world_size=1024):
    """One rank of a thousand, whose messages go nowhere."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    rank, report = int(rank), {"checked": 0, "wrong": []}
    expect = expecting(report)

    def initialise():
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)

    initialise()
    check_bytes(expect, world_size, rank, world_size * 64 * 256)
    for node in (False, 8):
        for numel in (0, 1, world_size - 1, 100_003):
            # The fake group has no answer to a rank that owns all and so sends nothing.
            if rank or numel > world_size:
                all_reduce(torch.ones(numel), bits=4, hierarchical=node)
            part = torch.empty(numel)
            reduce_scatter(part, torch.ones(numel * world_size), bits=8, hierarchical=node)
    # Between nodes of 8 each rank sends its part of an eighth: as many times less.
    numel = world_size * 256
    counted = []
    for node in (False, 8):
        reducer = Reducer(GradientCommunicationConfig.parse({"bits": 8, "hierarchical": node}))
        with CountedWire() as wire_:
            exchange = reducer.start_all_reduce([torch.ones(numel)], [Span("", 0, 0, 0, numel)], Call(1.0))
            exchange.reduce()
        traffic = reducer.statistics.take()
        expect(traffic.sent_bytes == wire_.bytes, "bytes of nodes", traffic, wire_.bytes)
        ranks_beyond = world_size - 1 if not node else world_size // node - 1
        expect(wire_.bytes == 2 * ranks_beyond * (256 + 4), "formula of nodes", node, wire_.bytes)
        counted.append(wire_.bytes)
    expect(counted[1] * 8 < counted[0], "nodes", counted)
    check_of_many(expect, 8)

    # A group that is gone takes what was made for it along.
    collectives = sys.modules["ds_quant.comm.collectives"]
    expect(len(collectives._calls) == 1, "groups", len(collectives._calls))
    dist.destroy_process_group()
    initialise()
    all_reduce(torch.ones(100_003))
    gc.collect()
    expect(list(collectives._calls) == [dist.group.WORLD], "groups that are gone", len(collectives._calls))
    Path(f"{output}.{rank}").write_text(json.dumps(report))


if __name__ == "__main__":
    (main if len(sys.argv) == 2 else main_of_many)(*sys.argv[1:])
