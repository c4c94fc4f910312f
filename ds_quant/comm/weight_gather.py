"""The all-gather of a flat group of weights, each as its layout says, in rounds that overlap."""

from collections import deque
from typing import Any, NamedTuple

from torch import Tensor
from torch import distributed as torch_dist

from ds_quant.comm import backend
from ds_quant.comm.buffers import Buffers
from ds_quant.comm.statistics import Statistics
from ds_quant.comm.weight_codes import decode, encode, shared_absmax
from ds_quant.comm.weight_layout import ALIGNMENT, Message, WeightLayout, exchange_bytes


class _Round(NamedTuple):
    messages: tuple[Message, ...]
    slots: list[Tensor]
    taken: tuple[Tensor, Tensor]
    work: Any


class WeightGather:
    """Gathers one group of weights over one process group. All ranks of it make it, and call it together.

    Args:
        buffers: where messages lie.
        statistics: where traffic is counted.
    """

    def __init__(self, layout: WeightLayout, group: backend.Group, buffers: Buffers, statistics: Statistics) -> None:
        self.layout, self.group = layout, group
        self.world_size, self.rank = torch_dist.get_world_size(group), torch_dist.get_rank(group)
        self._buffers, self._statistics = buffers, statistics

    def gather(self, flat: Tensor) -> None:
        """Have `flat`, whose own partition is right, hold what the owners of the others send. 1-D, contiguous."""
        if self.world_size == 1:
            return
        shared, others = None, self.world_size - 1
        if self.layout.num_shared:
            shared = shared_absmax(flat, self.layout.shared_runs[self.rank], self.layout.num_shared)
            backend.all_reduce_max(shared, self.group)
            self._statistics.count(exchange_bytes(self.layout.num_shared, self.world_size), 0, 0)
        under_way: deque[_Round] = deque()
        for messages in self.layout.rounds:
            under_way.append(self._send(flat, messages, shared))
            own = messages[self.rank]
            self._statistics.count(others * own.num_bytes, others * own.numel, flat.element_size())
            if len(under_way) > 1:
                self._receive(under_way.popleft(), flat, shared)
        while under_way:
            self._receive(under_way.popleft(), flat, shared)

    def _send(self, flat: Tensor, messages: tuple[Message, ...], shared: Tensor | None) -> _Round:
        message = self._buffers.take(messages[self.rank].num_bytes, flat.device)
        for run in messages[self.rank].runs:
            encode(flat, run, shared, message)
        sizes = [0 if rank == self.rank else other.num_bytes for rank, other in enumerate(messages)]
        padded = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
        received = self._buffers.take(sum(padded), flat.device)
        slots = [slot[:size] for slot, size in zip(received.split(padded), sizes, strict=True)]
        slots[self.rank] = message
        work = backend.all_gather_uneven(slots, message, self.group)
        return _Round(messages, slots, (message, received), work)

    def _receive(self, of_round: _Round, flat: Tensor, shared: Tensor | None) -> None:
        if of_round.work is not None:
            of_round.work.wait()
        for rank, message in enumerate(of_round.messages):
            if rank != self.rank:
                for run in message.runs:
                    decode(of_round.slots[rank], run, shared, flat)
        for buffer in of_round.taken:
            self._buffers.give_back(buffer)
