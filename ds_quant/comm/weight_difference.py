"""Weights gathered as the difference to what the ranks have: errors do not add up, as in arXiv 2410.15526 (SDP4Bit).

All ranks hold the same replica R of the weights, in the model's dtype. The owner of a partition, whose fp32 weights are
M, sends codes and scales of M - R, in blocks as gradients are sent (`numerics.wire`), and every rank, the owner too,
adds what it reads to R in fp32 and rounds to the dtype. What a step loses is part of the next step's difference.

A block with an Inf or a NaN comes back as NaN.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_quant.comm import layout
from ds_quant.comm.buffers import Buffers
from ds_quant.comm.exchange import Words
from ds_quant.comm.layout import Piece
from ds_quant.comm.message_gather import GroupOfNodes
from ds_quant.comm.statistics import Statistics
from ds_quant.comm.weight_layout import Weight
from ds_quant.config import WeightCommunicationConfig
from ds_quant.kernels import wire
from ds_quant.kernels.wire import Parts, WireFormat

BLOCKS = {8: 256, 4: 128}
WHOLE_EVERY = 1000


def wire_format(config: WeightCommunicationConfig) -> WireFormat:
    assert config.bits is not None
    return WireFormat(config.bits, config.block_size or BLOCKS[config.bits], config.rotation)


def rounding_of(config: WeightCommunicationConfig) -> str:
    return config.rounding or ("stochastic" if config.bits == 4 else "nearest")


class DifferenceGather:
    """Gathers the differences of one flat group over one process group. All ranks of it make and call it together.

    Args:
        weights: those of the group, in order; padding between and behind them is not sent.
        numel: of the group, a multiple of the number of ranks.
        group: with its nodes where messages are to travel between these once.
    """

    def __init__(
        self,
        weights: Sequence[Weight],
        numel: int,
        fmt: WireFormat,
        group: GroupOfNodes,
        buffers: Buffers,
        statistics: Statistics,
    ) -> None:
        self.group, self.fmt = group, fmt
        self.world_size, self.rank = group.world_size, group.rank
        self._buffers, self._statistics = buffers, statistics
        self._size = numel // self.world_size
        pieces = [piece for weight in weights for piece in _pieces(weight, self._size)]
        self.layout = layout.build(pieces, fmt, self.world_size, self.rank)
        counts = [sum(piece.owner == owner for piece in self.layout.pieces) for owner in range(self.world_size)]
        ends = [sum(counts[: owner + 1]) for owner in range(self.world_size)]
        self._of_owner = [
            self._placed(owner, Parts(*(column[end - count : end] for column in self.layout.gathered)))
            for owner, (count, end) in enumerate(zip(counts, ends, strict=True))
        ]

    @property
    def sent_bytes(self) -> int:
        """What a rank puts on the wire; of two levels, between nodes."""
        return self.group.num_receivers * self.layout.slot_bytes

    def _placed(self, owner: int, parts: Parts) -> Parts:
        """Places in the messages of all owners, of those that a layout has put in the order of the ranks."""
        moved = (self.group.place(owner) - owner) * self.layout.slot_bytes
        if moved == 0:
            return parts
        parts = parts._replace(scale_at=parts.scale_at + moved, codes_at=parts.codes_at + moved)
        for column in (parts.scale_at, parts.codes_at):
            column.setflags(write=False)  # as `layout.build` has them
        return parts

    @torch.no_grad()
    def gather(self, flat: Tensor, masters: Tensor, replica: Tensor, key: Words | None) -> None:
        """Move `flat`, the replica of all partitions but the own one, towards the owners' masters.

        masters: fp32, of the own partition. replica: of the own partition before `flat` was written to. key: of
        stochastic rounding, None for nearest.
        """
        if self.world_size == 1:
            return
        taken = self._buffers.take(4 * self._size, flat.device)
        values = taken.view(torch.float32)
        torch.sub(masters.to(flat.device), replica.float(), out=values)
        gathered = self._buffers.take(self.world_size * self.layout.slot_bytes, flat.device)
        begin = self.group.place(self.rank) * self.layout.slot_bytes
        slot = gathered[begin : begin + self.layout.slot_bytes]
        if self.layout.own_pieces:
            errors = self._statistics.errors_on(flat.device)
            wire.quantize([values], self.layout.own, slot, self.fmt, key=key, errors=errors)
        gathering = self.group.gather(gathered)
        receivers = self.group.num_receivers
        self._statistics.count(self.sent_bytes, receivers * self.layout.own_numel, flat.element_size())
        partitions = flat.view(self.world_size, self._size)
        partitions[self.rank].copy_(replica)
        gathering.wait()
        values.zero_()  # padding stays what it is
        for owner, partition in enumerate(partitions):
            if len(self._of_owner[owner].numel):
                wire.dequantize(gathered, self._of_owner[owner], [values], self.fmt)
                partition.copy_(values.add_(partition))
                values.zero_()
        for buffer in (taken, gathered):
            self._buffers.give_back(buffer)


def _pieces(weight: Weight, size: int) -> list[Piece]:
    """A weight cut at the ends of partitions; pieces begin at elements of their partition."""
    pieces, begin, length = [], 0, torch.Size(weight.shape).numel()
    while begin < length:
        owner, start = divmod(weight.start + begin, size)
        numel = min(length - begin, size - start)
        pieces.append(Piece(weight.name, begin, 0, start, numel, owner))
        begin += numel
    return pieces


def describe_weights(config: WeightCommunicationConfig) -> str:
    """One line for reports."""
    between = ["once between nodes"] if config.hierarchical else []
    if config.mode == "codes":
        return ", ".join(["the codes that layers compute with", *between])
    fmt = wire_format(config)
    words = [f"their differences in {fmt.bits} bits in blocks of {fmt.block_size}"]
    if rounding_of(config) == "stochastic":
        words.append("stochastic rounding")
    if fmt.rotation != "none":
        words.append(f"{fmt.rotation} rotation")
    return ", ".join(words + between)
