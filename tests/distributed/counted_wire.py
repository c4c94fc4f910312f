"""Bytes that quantized collectives put on the wire, counted and by formula."""

import torch
from torch import distributed as dist

from ds_quant.comm import backend
from ds_quant.comm.exchange import Call
from ds_quant.comm.layout import Span, cut_each, cut_evenly
from ds_quant.comm.reducer import Reducer
from ds_quant.config import GradientCommunicationConfig


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
