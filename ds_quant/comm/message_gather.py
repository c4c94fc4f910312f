"""All-gathers of messages, in one level or in two.

In two levels a rank sends its message to the ranks of its own number in other nodes, and then passes on inside its node
what it has got of them, as it came: between nodes a message travels once to each, and all ranks read the same bytes as
in one level. Messages lie number by number, and of a number node by node, so that what is passed on lies together.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as torch_dist

from ds_quant.comm import backend
from ds_quant.comm.hierarchy import Nodes


class GroupOfNodes:
    """A process group, and the nodes that its messages travel between; one level where these are None."""

    def __init__(self, group: backend.Group, nodes: Nodes | None) -> None:
        self.group, self.nodes = group, nodes
        self.world_size, self.rank = torch_dist.get_world_size(group), torch_dist.get_rank(group)

    @property
    def num_receivers(self) -> int:
        """Ranks that a rank sends its message to: of two levels, in other nodes."""
        return (self.nodes.num_nodes if self.nodes else self.world_size) - 1

    def place(self, rank: int) -> int:
        """Number of the slot in which the message of a rank lies."""
        if self.nodes is None:
            return rank
        node, number = divmod(rank, self.nodes.size)
        return number * self.nodes.num_nodes + node

    def gather(self, gathered: Tensor) -> "Gathering":
        """Start it, of equal slots: the message of this rank lies in its slot of `gathered` already."""
        slots = gathered.view(self.world_size, -1)
        own = slots[self.place(self.rank)]
        if self.nodes is None:
            return Gathering(backend.all_gather(gathered, own, self.group))
        size, inside = self.nodes.size, self.nodes.inside
        chunk = gathered.view(size, -1)[self.nodes.number]
        work = backend.all_gather(chunk, own, self.nodes.between)
        return Gathering(work, lambda: backend.all_gather(gathered, chunk, inside))

    def gather_uneven(self, slots: Sequence[Tensor]) -> "Gathering":
        """Start it, of slots of any sizes that lie one behind the other: that of this rank holds its message.

        In `slots` they stand as they lie.
        """
        own = slots[self.place(self.rank)]
        if self.nodes is None:
            return Gathering(backend.all_gather_uneven(list(slots), own, self.group))
        count, number, inside = self.nodes.num_nodes, self.nodes.number, self.nodes.inside
        likes = list(slots[number * count : (number + 1) * count])
        chunks = [_together(slots[begin : begin + count]) for begin in range(0, self.world_size, count)]
        work = backend.all_gather_uneven(likes, own, self.nodes.between)
        return Gathering(work, lambda: backend.all_gather_uneven(chunks, chunks[number], inside))

    def all_reduce_max(self, magnitudes: Tensor) -> None:
        """The largest of each element over the ranks, in place; fp32, 1-D, nothing negative, no NaN."""
        if self.nodes is None:
            backend.all_reduce_max(magnitudes, self.group)
            return
        backend.all_reduce_max(magnitudes, self.nodes.inside)
        size, numel = self.nodes.size, magnitudes.numel()
        padded = torch.nn.functional.pad(magnitudes, (0, -numel % size))
        share = padded.view(size, -1)[self.nodes.number]
        backend.all_reduce_max(share, self.nodes.between)
        work = backend.all_gather(padded, share, self.nodes.inside)
        if work is not None:
            work.wait()
        magnitudes.copy_(padded[:numel])


class Gathering:
    """An all-gather under way. `pass_on` starts its second level."""

    def __init__(self, work: Any, pass_on: Callable[[], Any] | None = None) -> None:
        self._work, self._pass_on = work, pass_on

    def wait(self) -> None:
        """Wait for all. To be called once, by all ranks in the same order."""
        if self._work is not None:
            self._work.wait()
        if self._pass_on is not None:
            work = self._pass_on()
            if work is not None:
                work.wait()


def _together(slots: Sequence[Tensor]) -> Tensor:
    """The memory from the first to the last of some slots, and what lies between them."""
    first, last = slots[0], slots[-1]
    begin, end = first.storage_offset(), last.storage_offset() + last.numel()
    return first.as_strided((end - begin,), (1,), begin)
