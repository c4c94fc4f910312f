"""The all-gather of a flat group of weights, each as its layout says, in rounds that overlap."""

import bisect
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ds_quant.comm.buffers import Buffers
from ds_quant.comm.message_gather import Gathering, GroupOfNodes
from ds_quant.comm.received_codes import ReceivedCodes
from ds_quant.comm.statistics import Statistics
from ds_quant.comm.weight_codes import decode, encode, sent_codes, shared_absmax, write_values
from ds_quant.comm.weight_layout import ALIGNMENT, Message, Run, WeightLayout, exchange_bytes


class _Round(NamedTuple):
    messages: tuple[Message, ...]
    slots: list[Tensor]
    """Of each rank."""
    taken: Tensor
    gathering: Gathering


class WeightGather:
    """Gathers one group of weights over one process group. All ranks of it make it, and call it together.

    Args:
        layout: for all ranks of the group.
        group: with its nodes where messages are to travel between these once.
        buffers: where messages lie.
        statistics: where traffic is counted.
    """

    def __init__(self, layout: WeightLayout, group: GroupOfNodes, buffers: Buffers, statistics: Statistics) -> None:
        self.layout, self.group = layout, group
        self.world_size, self.rank = group.world_size, group.rank
        self._buffers, self._statistics = buffers, statistics

    @property
    def sent_bytes(self) -> int:
        """What this rank puts on the wire; of two levels, between nodes."""
        return self.layout.sent_bytes(self.rank, self.group.nodes.size if self.group.nodes else 1)

    def gather(self, flat: Tensor, received: Sequence[ReceivedCodes] = ()) -> None:
        """Have `flat`, whose own partition is right, hold what the owners of the others send. 1-D, contiguous.

        received: takes the codes of its weights, own ones too; in the order of the group.
        """
        if self.world_size == 1:
            return
        find = _Finder(received)
        shared, receivers = None, self.group.num_receivers
        if self.layout.num_shared:
            shared = shared_absmax(flat, self.layout.shared_runs[self.rank], self.layout.num_shared)
            self.group.all_reduce_max(shared)
            node_size = self.world_size // (receivers + 1)
            self._statistics.count(exchange_bytes(self.layout.num_shared, self.world_size, node_size), 0, 0)
        under_way: deque[_Round] = deque()
        for messages in self.layout.rounds:
            under_way.append(self._send(flat, messages, shared))
            own = messages[self.rank]
            self._statistics.count(receivers * own.num_bytes, receivers * own.numel, flat.element_size())
            if len(under_way) > 1:
                self._receive(under_way.popleft(), flat, shared, find)
        while under_way:
            self._receive(under_way.popleft(), flat, shared, find)

    def _send(self, flat: Tensor, messages: tuple[Message, ...], shared: Tensor | None) -> _Round:
        ranks = sorted(range(self.world_size), key=self.group.place)
        sizes = [messages[rank].num_bytes for rank in ranks]
        padded = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
        taken = self._buffers.take(sum(padded), flat.device)
        slots = [slot[:size] for slot, size in zip(taken.split(padded), sizes, strict=True)]
        of_ranks = [slots[self.group.place(rank)] for rank in range(self.world_size)]
        for run in messages[self.rank].runs:
            encode(flat, run, shared, of_ranks[self.rank])
        return _Round(messages, of_ranks, taken, self.group.gather_uneven(slots))

    def _receive(self, of_round: _Round, flat: Tensor, shared: Tensor | None, find: "_Finder") -> None:
        of_round.gathering.wait()
        for rank, message in enumerate(of_round.messages):
            for run in message.runs:
                into = find.of(run)
                if into is not None:
                    codes, absmax = sent_codes(of_round.slots[rank], run, shared, flat.dtype)
                    into.put(run, codes, absmax)
                    if rank != self.rank:
                        write_values(codes, absmax, run, flat)
                elif rank != self.rank:
                    decode(of_round.slots[rank], run, shared, flat)
        self._buffers.give_back(of_round.taken)


class _Finder:
    """Finds where the codes of a run are to go."""

    def __init__(self, received: Sequence[ReceivedCodes]) -> None:
        self._received = received
        self._starts = [each.start for each in received]

    def of(self, run: Run) -> ReceivedCodes | None:
        number = bisect.bisect_right(self._starts, run.start) - 1
        if number < 0 or run.start >= self._starts[number] + self._received[number].codes.numel():
            return None
        return self._received[number]
