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
from torch import distributed as dist
from weight_gathers import check_of_many, check_two_levels

from ds_quant.base.errors import ConfigError
from ds_quant.comm import all_reduce, backend, reduce_scatter
from ds_quant.comm.exchange import Call
from ds_quant.comm.layout import Span, build, cut_each, cut_evenly
from ds_quant.comm.reducer import STREAM, Reducer
from ds_quant.config import GradientCommunicationConfig
from ds_quant.numerics import wire
from ds_quant.numerics.random import derive_words, fold_words

SIZES = (1, 3, 255, 256, 257, 1000, 4097)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LEVELS = {8: 127, 4: 7}


def values(size, dtype, rank, seed):
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return (torch.randn(size, generator=generator) * 10 ** torch.rand(size, generator=generator)).to(dtype)


def bound(shares, bits, block_size, blocks_of_result, rotation):
    """The largest error of a sum: half a step of each share that was sent, and half of the result's, all roundings
    included. Blocks start at pieces, which start at multiples of the block, so a step is at most that of the whole."""
    spread = block_size**0.5 if rotation == "hadamard" else 1.0  # of one element's error over its block, at most
    steps = [share.abs().max() / LEVELS[bits] for share in shares]
    sum_of_steps = sum(steps)
    total = sum_of_steps
    if blocks_of_result:
        total = total + (sum(share.abs().max() for share in shares) + sum_of_steps) / LEVELS[bits]
    # Rotated values may be sqrt(block) times as large as the largest before.
    return float(total * spread * spread + 1e-5 * sum(share.abs().max() for share in shares))


def simulate(shares, pieces, fmt, *, factor=1.0, keys=None, feedbacks=None, residual_scale=1.0, output_dtype=None):
    """All ranks of a reduction in one process, by the definition of `numerics.wire` and a layout.

    `shares` are each rank's tensors, `keys` its random bits. Returns each rank's tensors after an all-reduce, or, with
    `output_dtype`, each rank's part of a reduce-scatter.
    """
    world_size = len(shares)
    ranks = range(world_size)
    layouts = [build(pieces, fmt, world_size, rank) for rank in ranks]

    def options(rank, phase, owned, inverse):
        found = {} if keys is None or keys[rank] is None else {"key": derive_words(keys[rank], phase)}
        if feedbacks is not None:
            slots = feedbacks[rank].slots(owned, torch.device("cpu"))
            found["residuals"] = wire.Residuals(slots.read, slots.write, residual_scale, inverse)
        return found

    messages = []
    for rank, layout in enumerate(layouts):
        message = torch.zeros(sum(layout.send_splits), dtype=torch.uint8)
        wire.quantize(
            shares[rank], layout.sent, message, fmt, **options(rank, 0, layout.sent_pieces, 1.0 / residual_scale)
        )
        messages.append(message.split(layout.send_splits))
    slots, outputs = [], []
    for rank, layout in enumerate(layouts):
        received = torch.stack([messages[other][rank] for other in ranks if other != rank])
        where = (shares[rank], layout.own, received, rank, fmt)
        if output_dtype is not None:
            outputs.append(torch.empty(layout.own_numel, dtype=output_dtype))
            wire.reduce(*where, factor=factor, output=outputs[-1])
        else:
            slots.append(torch.zeros(layout.slot_bytes, dtype=torch.uint8))
            about = options(rank, 1, layout.own_pieces, 1.0 / (factor * residual_scale))
            wire.reduce(*where, factor=factor, message=slots[-1], **about)
    if output_dtype is not None:
        return outputs
    results = [[tensor.clone() for tensor in tensors] for tensors in shares]
    for layout, tensors in zip(layouts, results, strict=True):
        wire.dequantize(torch.cat(slots), layout.gathered, tensors, fmt)
    return results


def expected_of(shares, pieces, fmt, node, *, factor, keys, output_dtype=None):
    """`simulate`, for one flat tensor a rank and either number of levels; sums within nodes of `node` ranks are those
    of their dtype. One rank alone quantizes nothing."""
    world_size = len(shares)
    if world_size == 1:
        return [(shares[0].float() * factor).to(output_dtype or shares[0].dtype)]
    if not node:
        found = simulate(
            [[share] for share in shares], pieces, fmt, factor=factor, keys=keys, output_dtype=output_dtype
        )
        return found if output_dtype is not None else [tensors[0] for tensors in found]
    sums = [[sum(shares[at + 1 : at + node], shares[at])] for at in range(0, world_size, node)]
    results = [None] * world_size if output_dtype is not None else [share.clone() for share in shares]
    for number in range(node):
        chunk = [piece._replace(owner=piece.owner // node) for piece in pieces if piece.owner % node == number]
        found = simulate(sums, chunk, fmt, factor=factor, keys=keys[number::node], output_dtype=output_dtype)
        if output_dtype is not None:
            results[number::node] = found
            continue
        for result in results:
            for piece in chunk:
                at = slice(piece.start, piece.start + piece.numel)
                result[at] = found[0][0][at]
    return results


def as_sent(tensor):
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def message_bytes(pieces, fmt):
    """The formula of comm/layout.py, for the message to one owner."""
    blocks = sum(-(-piece.numel // fmt.block_size) for piece in pieces)
    codes = sum(piece.numel if fmt.bits == 8 else -(-piece.numel // 2) for piece in pieces)
    return -(-(4 * blocks + codes) // 4) * 4


class CountedWire:
    """Counts, at the collectives, the bytes that this rank puts on the wire; not those within a node."""

    def __init__(self, inside=None):
        self.inside = inside
        self.bytes = self.calls = 0
        self.originals = backend.all_to_all, backend.all_gather

    def __enter__(self):
        backend.all_to_all, backend.all_gather = self.all_to_all, self.all_gather
        return self

    def __exit__(self, *_):
        backend.all_to_all, backend.all_gather = self.originals

    def all_to_all(self, output, message, output_splits, splits, group):
        assert message.numel() * message.element_size() == sum(splits)
        assert output.numel() == sum(output_splits)
        self.bytes += sum(splits) - splits[dist.get_rank(group)]
        self.calls += 1
        return self.originals[0](output, message, output_splits, splits, group)

    def all_gather(self, output, message, group):
        if group is not self.inside or group is None:
            self.bytes += (dist.get_world_size(group) - 1) * message.numel() * message.element_size()
            self.calls += 1
        return self.originals[1](output, message, group)


def check_bytes(expect, world_size, rank, numel):
    """What crosses the wire is what the formula says, what is counted, and no more than is promised."""
    largest_share = {8: 0.26, 4: 0.135}  # of fp32: (1 + 4 / 256) / 4 and (1 / 2 + 4 / 256) / 4, and padding
    for bits, most in largest_share.items():
        reducer = Reducer(GradientCommunicationConfig.parse({"bits": bits}))
        for spans in ([Span("", 0, 0, 0, numel)], [Span("a", 0, 0, 0, 1001), Span("b", 0, 0, 1001, numel - 1001)]):
            values = torch.ones(numel)
            for name, pieces in (
                ("all_reduce", cut_evenly(spans, reducer.fmt, world_size)),
                ("reduce_scatter", cut_each(spans, world_size)),
            ):
                sizes = [
                    message_bytes([piece for piece in pieces if piece.owner == owner], reducer.fmt)
                    for owner in range(world_size)
                ]
                formula = sum(sizes) - sizes[rank]
                ring = (world_size - 1) / world_size * 4 * numel
                with CountedWire() as wire_:
                    if name == "all_reduce":
                        formula += (world_size - 1) * max(sizes)
                        ring *= 2
                        reducer.all_reduce([values], spans, Call(1.0))
                    else:
                        output = torch.empty(reducer.own_numel(pieces))
                        reducer.reduce_scatter([values], pieces, output, Call(1.0))
                traffic = reducer.statistics.take()
                what = (name, bits, len(spans), world_size)
                expect(wire_.bytes == formula, "bytes, formula", *what, wire_.bytes, formula)
                expect(traffic.sent_bytes == wire_.bytes, "bytes, counted", *what, traffic, wire_.bytes)
                calls = {"all_reduce": 2, "reduce_scatter": 1}[name] if world_size > 1 else 0
                expect(wire_.calls == calls, "codes and scales in one message", *what, wire_.calls)
                if world_size > 1:
                    expect(wire_.bytes <= most * ring, "more bytes than promised", *what, wire_.bytes / ring)
                    expect(wire_.bytes >= ring * bits / 32 * 0.99, "bytes are missing", *what, wire_.bytes / ring)
                    # In the gradient's own dtype the same exchange sends what a ring does, but for uneven shares.
                    expect(abs(traffic.unquantized_bytes / ring - 1) < 0.01, "unquantized", *what, traffic)


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


def same_on_all(tensor):
    raw = tensor.contiguous().view(-1).view(torch.uint8).clone()
    others = [torch.empty_like(raw) for _ in range(dist.get_world_size())]
    dist.all_gather(others, raw)
    return all(torch.equal(raw, other) for other in others)


def cases(world_size):
    for number, (bits, rotation, rounding) in enumerate(
        [(8, "none", "nearest"), (4, "none", "nearest"), (4, "hadamard", "nearest"), (8, "none", "stochastic")]
    ):
        for size in SIZES:
            yield number, bits, rotation, rounding, size, DTYPES[(number + size) % len(DTYPES)]


def expecting(report):
    """A function that counts a condition in the report, and notes what is wrong where it does not hold."""

    def expect(condition, *what):
        report["checked"] += 1
        if not condition:
            report["wrong"].append(" ".join(map(str, what)))

    return expect


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
