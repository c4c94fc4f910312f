"""Two levels: gradients are summed inside a node in their own dtype, and cross between nodes in few bits.

The ranks of a group stand node by node: with m ranks a node, rank r is number r % m of node r // m. Inside a node a
reduce-scatter hands rank number l the node's sum of all pieces whose owner is number l of some node; the l's of all
nodes then reduce these among themselves, quantized. What each of them requantized for an all-reduce is gathered between
the nodes and then inside them, as codes. After ZeRO++'s two-level scheme (arXiv 2306.10209), with the fast level first.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch import distributed as torch_dist
from torch.distributed import distributed_c10d

from ds_quant.base.errors import fail
from ds_quant.comm import backend
from ds_quant.comm.exchange import Call, Channel, Exchange
from ds_quant.comm.layout import Layout, Piece, build
from ds_quant.kernels import wire

WHERE = "ds_quant.communication.gradient.hierarchical"


class Nodes(NamedTuple):
    """Where a rank of a group stands, and whom it talks to."""

    size: int
    """Ranks a node."""
    num_nodes: int
    node: int
    number: int
    """Of the rank within its node."""
    inside: backend.Group
    between: backend.Group
    """The ranks of the same number in all nodes."""


def ranks_per_node(setting: bool | int, where: str = WHERE) -> int:
    """The number that `"hierarchical"` means. Raises ConfigError where `true` cannot be told."""
    if setting is not True:
        return int(setting)
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    if not local.isdecimal() or int(local) < 1:
        allowed = "true where the launcher sets LOCAL_WORLD_SIZE (deepspeed, torchrun), or the ranks in a node"
        raise fail(where, True, allowed, "write the number of ranks in a node")
    return int(local)


def check_nodes(world_size: int, size: int, where: str = WHERE) -> None:
    """Raise ConfigError where the ranks do not fill whole nodes, two at least."""
    if world_size % size or world_size == size:
        allowed = f"a divisor of the {world_size} ranks that exchange them, less than all: one node sends no codes"
        raise fail(where, size, allowed, "correct it, or set false")


def make_nodes(group: backend.Group, size: int) -> Nodes:
    """Groups inside and between nodes, made by all ranks of `group` together."""
    world_size, rank = torch_dist.get_world_size(group), torch_dist.get_rank(group)
    members = torch_dist.get_process_group_ranks(group)
    num_nodes = world_size // size
    node, number = divmod(rank, size)
    # Every group by its members alone: other ranks of the job need not take part.
    with _named_alike(group), _unbound(torch_dist.group.WORLD):
        inside = torch_dist.new_group(members[node * size : (node + 1) * size], use_local_synchronization=True)
        between = torch_dist.new_group(members[number::size], use_local_synchronization=True)
    return Nodes(size, num_nodes, node, number, inside, between)


@contextmanager
def _unbound(world: Any) -> Iterator[None]:
    """Context in which the group of all ranks is bound to no device.

    Where it is (`init_process_group(device_id=...)`, as DeepSpeed calls it on CUDA), torch splits new groups off from
    its communicator, for which it waits for all ranks of the job: also for those that are in none of these groups.
    """
    bound = world.bound_device_id
    if bound is None:
        yield
        return
    world.bound_device_id = None
    try:
        yield
    finally:
        world.bound_device_id = bound


@contextmanager
def _named_alike(group: backend.Group) -> Iterator[None]:
    """Context in which the ranks of `group` give new groups the same names.

    torch makes a name of a group's ranks and of how many groups its maker has. Where ranks have been in different
    numbers of groups, of experts say, they would wait for each other under different names for ever.
    """
    names: dict[Any, Any] = distributed_c10d._world.pg_names
    missing = max(backend.gather_objects(len(names), group)) - len(names)
    stand_ins = [object() for _ in range(missing)]
    names.update(dict.fromkeys(stand_ins, ""))
    try:
        yield
    finally:
        for one in stand_ins:
            del names[one]


class TwoLevelLayout(NamedTuple):
    """A layout of the whole group, and what its two levels make of it."""

    whole: Layout
    chunks: tuple[tuple[Piece, ...], ...]
    """Pieces for each number within a node."""
    chunk_numel: int
    """Elements of the longest chunk: a reduce-scatter has equal ones."""
    between: Layout
    """Of the own chunk, between the nodes."""
    gathered: wire.Parts
    """Places of all pieces in the gathered messages of all numbers of a node, at multiples of `slot_bytes`."""
    slot_bytes: int


def two_level(whole: Layout, nodes: Nodes) -> TwoLevelLayout:
    """Cuts a layout for all ranks into one within nodes and one between them."""
    chunks = tuple(
        tuple(piece for piece in whole.pieces if piece.owner % nodes.size == number) for number in range(nodes.size)
    )
    layouts = [_between(chunk, whole, nodes) for chunk in chunks]
    slot_bytes = max(layout.slot_bytes for layout in layouts) * nodes.num_nodes
    parts = [
        _moved_back(layout.gathered, chunk, number * slot_bytes)
        for number, (chunk, layout) in enumerate(zip(chunks, layouts, strict=True))
    ]
    gathered = wire.Parts(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    for column in gathered:
        column.setflags(write=False)  # as `build` has them
    return TwoLevelLayout(
        whole,
        chunks,
        max(sum(piece.numel for piece in chunk) for chunk in chunks),
        layouts[nodes.number],
        gathered,
        slot_bytes,
    )


class TwoLevelExchange(Exchange):
    """An `Exchange` that sums inside the node first and gathers there last."""

    def __init__(
        self,
        channel: Channel,
        nodes: Nodes,
        tensors: Sequence[Tensor],
        layout: TwoLevelLayout,
        call: Call,
        output: Tensor | None = None,
    ) -> None:
        super().__init__(channel._replace(group=nodes.between), tensors, layout.between, call, output)
        self.nodes, self.two_level, self.originals = nodes, layout, tensors

    def send(self) -> None:
        """Sum the chunks of the node, then as in one level."""
        first, numel = self.originals[0], self.two_level.chunk_numel
        num_bytes = numel * first.element_size()
        packed = self._take(self.nodes.size * num_bytes).view(first.dtype).reshape(self.nodes.size, numel)
        taken, given = [], []
        for row, chunk in zip(packed, self.two_level.chunks, strict=True):
            for piece, start in zip(chunk, _starts(chunk), strict=True):
                taken.append(row[start : start + piece.numel])
                given.append(self.originals[piece.source][piece.start : piece.start + piece.numel])
            row[sum(piece.numel for piece in chunk) :] = 0
        if taken:
            torch._foreach_copy_(taken, given)  # one launch where copies are kernels
        summed = self._take(num_bytes).view(first.dtype)
        backend.reduce_scatter(summed, packed.reshape(-1), self.nodes.inside)
        self.tensors = [summed]
        super().send()

    def finish(self) -> None:
        """As in one level, with the results of the other numbers of the node."""
        layout = self.two_level
        if self.output is None:
            self._wait()
            if self.nodes.size > 1:
                slots = self._take(self.nodes.size * layout.slot_bytes)
                own = slots[self.nodes.number * layout.slot_bytes :][: layout.slot_bytes]
                own[: self._gathered.numel()] = self._gathered
                self._work = backend.all_gather(slots, own, self.nodes.inside)
                self._wait()
                self._gathered = slots
            wire.dequantize(self._gathered, layout.gathered, self.originals, self.layout.fmt)
        self._give_back()


def _between(chunk: Sequence[Piece], whole: Layout, nodes: Nodes) -> Layout:
    """The layout between the nodes of a chunk that lies in one tensor, its pieces one after the other."""
    pieces = [
        piece._replace(source=0, start=start, owner=piece.owner // nodes.size)
        for piece, start in zip(chunk, _starts(chunk), strict=True)
    ]
    return build(pieces, whole.fmt, nodes.num_nodes, nodes.node)


def _starts(chunk: Sequence[Piece]) -> list[int]:
    """Where each piece begins within its chunk."""
    return [0, *itertools.accumulate(piece.numel for piece in chunk)][:-1]


def _moved_back(parts: wire.Parts, chunk: Sequence[Piece], begin: int) -> wire.Parts:
    """Places in messages that begin at byte `begin`, for the tensors that the chunk was copied from."""
    by_start = dict(zip(_starts(chunk), chunk, strict=True))
    originals = [by_start[start] for start in parts.start.tolist()]
    return parts._replace(
        source=np.array([piece.source for piece in originals], np.int64),
        start=np.array([piece.start for piece in originals], np.int64),
        scale_at=parts.scale_at + begin,
        codes_at=parts.codes_at + begin,
    )
