"""Gathers of weights in one level and in two, of the ranks that collectives.py runs on."""

import os

import torch
from torch import distributed as dist

from ds_quant.comm import backend
from ds_quant.comm.buffers import ALIGNMENT, Buffers
from ds_quant.comm.hierarchy import make_nodes
from ds_quant.comm.message_gather import GroupOfNodes
from ds_quant.comm.received_codes import ReceivedCodes
from ds_quant.comm.statistics import Statistics
from ds_quant.comm.weight_difference import DifferenceGather
from ds_quant.comm.weight_gather import WeightGather
from ds_quant.comm.weight_layout import Coding, Weight, build
from ds_quant.numerics.integer import quantize
from ds_quant.numerics.random import fold_words
from ds_quant.numerics.wire import WireFormat

SHAPES = [((37, 13), "row"), ((5, 61), None), ((21, 33), "column"), ((64, 7), "row"), ((19,), None), ((8, 50), "row")]


class Counted:
    """Context that counts what this rank sends to other ranks, in a node and between nodes."""

    NAMES = ("all_gather", "all_gather_uneven", "all_reduce_max")

    def __init__(self, node_size):
        self.node_size = node_size or 1
        self.inside = self.between = 0

    def __enter__(self):
        self.originals = {name: getattr(backend, name) for name in self.NAMES}
        for name, original in self.originals.items():
            setattr(backend, name, self._counting(name, original))
        return self

    def __exit__(self, *_):
        for name, original in self.originals.items():
            setattr(backend, name, original)

    def _counting(self, name, original):
        def collective(*arguments):
            *tensors, group = arguments
            ranks = dist.get_process_group_ranks(group)
            sent = tensors[-1].nbytes * (len(ranks) - 1)
            if name == "all_reduce_max":
                sent = 2 * sent // len(ranks)
            if ranks[0] // self.node_size == ranks[-1] // self.node_size:
                self.inside += sent
            else:
                self.between += sent
            if dist.get_backend(group) == "fake" and name == "all_gather_uneven":
                return None  # which torch's fake group has no answer to
            return original(*arguments)

        return collective


def weights_of(bits, world_size, dtype, generator, copies=1):
    """A flat group and the weights in it, padded for the ranks."""
    weights, parts, start = [], [], 0
    for number, (shape, side) in enumerate(SHAPES * copies):
        coding = Coding(bits, side) if side else None
        weights.append(Weight(f"w{number}", start, shape, coding))
        parts.append(torch.randn(torch.Size(shape).numel(), generator=generator))
        start += parts[-1].numel()
    parts.append(torch.zeros(-start % world_size))
    return torch.cat(parts).to(dtype), weights


def common_generator():
    """The same on all ranks, another in each run."""
    seed = torch.tensor([int.from_bytes(os.urandom(4), "little")])
    dist.broadcast(seed, 0)
    return torch.Generator().manual_seed(seed.item())


def stale(flat, group):
    """What a rank has before a gather."""
    size = flat.numel() // group.world_size
    own = slice(group.rank * size, (group.rank + 1) * size)
    found = torch.full_like(flat, 7.0)
    found[own] = flat[own]
    return found


def gathered_codes(flat, weights, group, expect, what, round_numel=100, *, with_codes=True):
    layout = build(weights, flat.numel(), group.world_size, flat.element_size(), round_numel)
    expect(layout.num_shared > 0, "shared rows", *what)
    statistics = Statistics()
    gather = WeightGather(layout, group, Buffers(), statistics)
    found = stale(flat, group)
    with Counted(group.nodes and group.nodes.size) as counted:
        wanting = [weight for weight in weights if weight.coding][1:] if with_codes else []
        received = [ReceivedCodes(weight.shape, weight.coding, weight.start, flat.device) for weight in wanting]
        gather.gather(found, received)
    check_bytes(gather, statistics, counted, expect, what)
    for codes, weight in zip(received, wanting, strict=True):
        values = flat[weight.start :][: codes.codes.numel()].view(weight.shape)
        wanted = quantize(values, weight.coding.bits, granularity=weight.coding.side)
        expect(torch.equal(codes.codes, wanted.codes), "codes that came", *what, weight.name)
        expect(torch.equal(codes.scale.nan_to_num(), wanted.scale.flatten().nan_to_num()), "scales that came", *what)
    return found, counted


def gathered_differences(flat, weights, group, expect, what, bits, rounding):
    statistics, buffers = Statistics(), Buffers()
    gather = DifferenceGather(weights, flat.numel(), WireFormat(bits, 32), group, buffers, statistics)
    size = flat.numel() // group.world_size
    own = slice(group.rank * size, (group.rank + 1) * size)
    found = flat.clone()
    masters = flat[own].float() + 0.01 * torch.sin(torch.arange(size))
    key = fold_words(5, 3, 0, group.rank + 1, 9) if rounding == "stochastic" else None
    found[own] = masters.to(flat.dtype)
    with Counted(group.nodes and group.nodes.size) as counted:
        gather.gather(found, masters, flat[own].clone(), key)
    check_bytes(gather, statistics, counted, expect, what)
    # Of all ranks a slot, and the fp32 difference of the own partition.
    expected = (
        -(-gather.layout.slot_bytes * group.world_size // ALIGNMENT) * ALIGNMENT + -(-4 * size // ALIGNMENT) * ALIGNMENT
    )
    expect(buffers.num_bytes == expected, "memory", *what, buffers.num_bytes, expected)
    return found, gather


def check_bytes(gather, statistics, counted, expect, what):
    sent = statistics.take().sent_bytes
    expect(counted.between == gather.sent_bytes == sent > 0, "bytes", *what, counted.between, gather.sent_bytes, sent)


def check_two_levels(expect, node_size, same_on_all):
    """Bit for bit what one level has, in as many bytes between nodes as nodes take."""
    everybody = dist.group.WORLD
    one = GroupOfNodes(everybody, None)
    two = GroupOfNodes(everybody, make_nodes(everybody, node_size))
    generator = common_generator()
    for bits, dtype in ((8, torch.bfloat16), (4, torch.float32), (5, torch.float16)):
        flat, weights = weights_of(bits, one.world_size, dtype, generator)
        flat[300], flat[400] = torch.nan, torch.inf
        what = ("codes", bits, dtype, node_size)
        wanted, flat_bytes = gathered_codes(flat, weights, one, expect, what)
        found, bytes_ = gathered_codes(flat, weights, two, expect, what)
        expect(torch.equal(found.nan_to_num(), wanted.nan_to_num()), "bits", *what)
        expect(bytes_.between < flat_bytes.between / node_size and bytes_.inside > 0, "fewer bytes", *what)
    for bits, dtype, rounding in ((8, torch.bfloat16, "nearest"), (4, torch.float32, "stochastic")):
        flat, weights = weights_of(8, one.world_size, dtype, generator)
        what = ("differences", bits, dtype, node_size)
        wanted, _ = gathered_differences(flat, weights, one, expect, what, bits, rounding)
        found, _ = gathered_differences(flat, weights, two, expect, what, bits, rounding)
        expect(torch.equal(found, wanted), "bits", *what)
        expect(same_on_all(found), "ranks differ", *what)
        expect(not torch.equal(found, flat), "nothing moved", *what)


def check_of_many(expect, node_size):
    """Layouts, places and memory of one rank of a fake process group: what it receives is not looked at."""
    everybody = dist.group.WORLD
    for nodes in (None, make_nodes(everybody, node_size)):
        group = GroupOfNodes(everybody, nodes)
        places = [group.place(rank) for rank in range(group.world_size)]
        expect(sorted(places) == list(range(group.world_size)), "places", places)
        generator = torch.Generator().manual_seed(0)
        flat, weights = weights_of(8, group.world_size, torch.bfloat16, generator, copies=7)
        what = ("many", nodes and nodes.size)
        gathered_codes(flat, weights, group, expect, what, round_numel=16, with_codes=False)
        _, gather = gathered_differences(flat, weights, group, expect, what, 8, "nearest")
        slot = gather.layout.slot_bytes
        for rank, parts in enumerate(gather._of_owner):
            ends = parts.codes_at + parts.numel
            inside = (parts.scale_at >= places[rank] * slot).all() and (ends <= (places[rank] + 1) * slot).all()
            expect(inside, "places of a message", *what, rank)
