"""Partitioned weights fetched as codes: what ZeRO's stage 3 gathers before the forward and the backward of a layer.

Stage 3 cuts every parameter by itself into equal partitions, one for each rank, the last of them padded. So each is a
group of its own (`weight_layout`), sent in one round. A fetch gathers several weights in one message of each rank, with
its part of each weight behind that of another. Slots are equal in size, those of the longest message of each weight.

The largest magnitude of a row or column that lies in several partitions is agreed on by `agree`, for all weights at
once, after weights were written.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as torch_dist

from ds_quant.comm import backend
from ds_quant.comm.buffers import Buffers
from ds_quant.comm.received_codes import ReceivedCodes
from ds_quant.comm.statistics import Statistics
from ds_quant.comm.weight_codes import encode, scale_of, sent_codes, shared_absmax, unpacked, values_of, write_values
from ds_quant.comm.weight_layout import (
    ALIGNMENT,
    PACKED_BLOCK,
    Coding,
    Weight,
    WeightLayout,
    build,
    exchange_bytes,
)


class PartitionedWeight:
    """How the partitions of one weight cross the wire.

    Args:
        dtype: in which it is gathered, and layers get it.
        world_size, rank: of the group that it is partitioned over.
    """

    def __init__(self, shape: Sequence[int], coding: Coding, dtype: torch.dtype, world_size: int, rank: int) -> None:
        self.shape, self.coding, self.dtype, self.rank = tuple(shape), coding, dtype, rank
        numel = torch.Size(shape).numel()
        self.size = -(-numel // world_size)
        """Elements of a partition, padding included."""
        layout = _layout(self.shape, coding, dtype.itemsize, world_size)
        (self.messages,) = layout.rounds
        self.num_shared = layout.num_shared
        longest = max(message.num_bytes for message in self.messages)
        self.slot_bytes = -(-longest // ALIGNMENT) * ALIGNMENT
        has_whole_rows = coding.side == "row" and self.size % shape[1] == 0 and self.size * world_size == numel
        self._are_alike = has_whole_rows and (coding.bits == 8 or self.size % PACKED_BLOCK == 0)
        """Messages of consecutive ranks can be joined to one."""
        begin = rank * self.size
        self.own = tuple(run._replace(start=run.start - begin) for run in self.messages[rank].runs)
        """The runs of this rank, by their places in its partition."""

    def shared_absmax(self, partition: Tensor) -> Tensor:
        """fp32 [num_shared]: what this rank has of the rows or columns that lie in several partitions."""
        runs = tuple(run for run in self.own if run.kind == "shared")
        # The largest is the largest after rounding, too.
        return shared_absmax(partition, runs, self.num_shared).to(self.dtype).float()

    def encode(self, partition: Tensor, shared: Tensor, slot: Tensor) -> None:
        values = partition.to(self.dtype)
        for run in self.own:
            encode(values, run, shared, slot)

    def decode(
        self, slots: Tensor, partition: Tensor, shared: Tensor, *, with_codes: bool = False
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """The weight and its padding, 1-D of `dtype`: the own part as it is, the others as their owners sent them.

        And, where asked for, what layers would quantize it to: codes int8 of its shape, and fp32 the scale of each
        row or column.

        slots: uint8 [world_size, slot_bytes], rows may lie apart.
        """
        begin, end = self.rank * self.size, (self.rank + 1) * self.size
        if self._are_alike and len(slots) > (1 if with_codes else 2):
            flat, codes, absmax = self._decode_together(slots)
            flat[begin:end].copy_(partition)
            return flat, (codes.view(self.shape), scale_of(absmax, self.coding.bits)) if with_codes else None
        flat = torch.empty(self.size * len(slots), dtype=self.dtype, device=partition.device)
        flat[begin:end].copy_(partition)
        received = ReceivedCodes(self.shape, self.coding, 0, flat.device) if with_codes else None
        for rank, slot in enumerate(slots):
            if rank != self.rank or received is not None:
                self._decode_one(slot, rank, shared, flat, received)
        return flat, None if received is None else (received.codes, received.scale)

    def _decode_one(
        self, slot: Tensor, rank: int, shared: Tensor, flat: Tensor, received: ReceivedCodes | None
    ) -> None:
        for run in self.messages[rank].runs:
            codes, absmax = sent_codes(slot, run, shared, self.dtype)
            if received is not None:
                received.put(run, codes, absmax)
            if rank != self.rank:
                write_values(codes, absmax, run, flat)

    def _decode_together(self, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What all ranks have sent, two or more, as one run of rows: few kernels for any number of ranks.

        Returns the weight, its codes and absmax. Of the own part, too: to leave it out takes one more pass of the rest.
        """
        (run,), count = self.messages[0].runs, len(slots)
        # Copies, as the absmax lie in between: the slots are used again.
        absmax = slots[:, : run.at].flatten().view(self.dtype).float()
        joined = run._replace(start=0, numel=count * self.size, at=0)
        codes = unpacked(slots[:, run.at : run.at + run.num_bytes].flatten(), joined)
        return values_of(codes, absmax, joined, self.dtype), codes, absmax


@functools.lru_cache(maxsize=1024)
def _layout(shape: tuple[int, ...], coding: Coding, itemsize: int, world_size: int) -> WeightLayout:
    """That of any weight of this shape: a model has few shapes, and a layout a message for each rank."""
    size = -(-torch.Size(shape).numel() // world_size)
    weight = Weight("weight", 0, shape, coding)
    return build([weight], size * world_size, world_size, itemsize, round_numel=size)


class Fetch:
    """Weights under way."""

    def __init__(
        self,
        weights: Sequence[PartitionedWeight],
        partitions: Sequence[Tensor],
        shared: Sequence[Tensor],
        group: backend.Group,
        buffers: Buffers,
    ) -> None:
        self._weights, self._partitions, self._shared, self._buffers = weights, partitions, shared, buffers
        device = partitions[0].device
        world_size, rank = torch_dist.get_world_size(group), torch_dist.get_rank(group)
        self._size = sum(weight.slot_bytes for weight in weights)
        self._gathered = buffers.take(world_size * self._size, device)
        own = self._gathered[rank * self._size : (rank + 1) * self._size]
        slots = own.split([weight.slot_bytes for weight in weights])
        for weight, partition, absmax, slot in zip(weights, partitions, shared, slots, strict=True):
            weight.encode(partition, absmax, slot)
        self._work: Any = backend.all_gather(self._gathered, own, group)

    def finish(self, with_codes: Sequence[bool]) -> list[tuple[Tensor, tuple[Tensor, Tensor] | None]]:
        """Wait for all; of each weight what `PartitionedWeight.decode` returns. To be called once."""
        if self._work is not None:
            self._work.wait()
        of_ranks = self._gathered.view(-1, self._size)
        found, at = [], 0
        for weight, partition, shared, with_its in zip(
            self._weights, self._partitions, self._shared, with_codes, strict=True
        ):
            slots = of_ranks[:, at : at + weight.slot_bytes]
            found.append(weight.decode(slots, partition, shared, with_codes=with_its))
            at += weight.slot_bytes
        self._buffers.give_back(self._gathered)
        return found


class WeightFetcher:
    """Fetches weights that are partitioned over one process group. All ranks of it call its methods together.

    Args:
        weights: all that it may be asked for, in the same order on all ranks.
    """

    def __init__(
        self, weights: Sequence[PartitionedWeight], group: backend.Group, buffers: Buffers, statistics: Statistics
    ) -> None:
        self.weights, self.group = weights, group
        self.world_size = torch_dist.get_world_size(group)
        self._buffers, self._statistics = buffers, statistics
        self._shared: dict[int, Tensor] = {}

    def agree(self, partitions: Sequence[Tensor], device: torch.device, *, counted: bool) -> None:
        """Learn the largest magnitudes of rows and columns that lie in several partitions, from `partitions` of all.

        device: where weights are fetched; partitions may be elsewhere.
        """
        pairs = zip(self.weights, partitions, strict=True)
        found = [weight.shared_absmax(part).to(device) for weight, part in pairs if weight.num_shared]
        together = torch.cat(found) if found else torch.empty(0, device=device)
        if found:
            backend.all_reduce_max(together, self.group)
            if counted:
                self._statistics.count(exchange_bytes(together.numel(), self.world_size), 0, 0)
        parts = together.split([weight.num_shared for weight in self.weights])
        self._shared = {id(weight): part for weight, part in zip(self.weights, parts, strict=True)}

    def start(self, weights: Sequence[PartitionedWeight], partitions: Sequence[Tensor], *, counted: bool) -> Fetch:
        """Send what this rank has of `weights`, and receive the rest."""
        fetch = Fetch(weights, partitions, [self._shared[id(one)] for one in weights], self.group, self._buffers)
        if counted:
            others = self.world_size - 1
            for weight in weights:
                self._statistics.count(others * weight.slot_bytes, others * weight.size, weight.dtype.itemsize)
        return fetch
