"""Which part of a flat group of weights crosses the wire how, and where in the messages it lies. Numbers only.

ZeRO's stages 1 and 2 lay the parameters of a group one behind the other and cut the whole into equal partitions, one
for each rank, wherever the cut falls. What the owner of a partition sends is cut into *runs*:

    rows      whole rows of a weight with a scale for each row: their absmax, and codes
    columns   a whole weight with a scale for each column: the same
    shared    elements of rows or columns that other partitions have parts of: codes; all ranks know the absmax
    whole     elements as they are

so that a message of E bytes an element in the group's dtype takes

    E for each row or column of the first two  +  E * whole elements  +  the bytes of the packed codes of each run

with n bytes for n codes of 8 bits, and as `numerics.packing` says below. Padding of the group is not sent. A partition
is sent in rounds of about `round_numel` elements: one is encoded while another travels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from ds_quant.numerics.packing import code_bytes

ROUND_NUMEL = 2**22
PACKED_BLOCK = 2**16
"""Elements of a run that are packed together below 8 bits."""
ALIGNMENT = 16

Side = Literal["row", "column"]


class Coding(NamedTuple):
    """How the layers of a weight quantize it."""

    bits: int
    side: Side
    """What shares a scale, of the weight as it is stored."""


class Weight(NamedTuple):
    """A parameter in a flat group."""

    name: str
    start: int
    """First element within the group."""
    shape: tuple[int, ...]
    coding: Coding | None
    """None: it is sent whole."""


class Run(NamedTuple):
    """Consecutive elements of one weight and one partition."""

    kind: Literal["rows", "columns", "shared", "whole"]
    start: int
    """First element within the group."""
    numel: int
    bits: int
    width: int
    """Elements of a row."""
    first_channel: int
    """Of `shared`: the number among the shared channels of the weight's first column, or of the row."""
    first_column: int
    """Of `shared` columns: that of the first element. -1: all of it is one row."""
    absmax_at: int
    """Byte within the message at which the absmax of rows or columns begin."""
    at: int
    """Byte at which codes or elements begin."""

    @property
    def num_channels(self) -> int:
        """Rows or columns whose absmax are sent."""
        if self.kind == "rows":
            return self.numel // self.width
        return self.width if self.kind == "columns" else 0

    @property
    def num_bytes(self) -> int:
        """Of the codes."""
        return code_bytes(self.numel, PACKED_BLOCK, self.bits)


class Message(NamedTuple):
    """What one owner sends to all others in one round."""

    runs: tuple[Run, ...]
    num_bytes: int

    @property
    def numel(self) -> int:
        return sum(run.numel for run in self.runs)


@dataclass(frozen=True, eq=False)
class WeightLayout:
    """A group of weights on the wire."""

    rounds: tuple[tuple[Message, ...], ...]
    """For each round the messages of all owners."""
    num_shared: int
    """Channels that several partitions have parts of."""

    @cached_property
    def shared_runs(self) -> tuple[tuple[Run, ...], ...]:
        """Those of each owner, of all rounds."""
        return tuple(
            tuple(run for message in messages for run in message.runs if run.kind == "shared")
            for messages in zip(*self.rounds, strict=True)
        )

    def sent_bytes(self, rank: int, node_size: int = 1) -> int:
        """What a rank puts on the wire: each message for each other node, and its part of the exchange of absmax.

        In one level each rank is a node. In two, what stays in the node does not count.
        """
        world_size = len(self.rounds[0]) if self.rounds else 1
        messages = sum(messages[rank].num_bytes for messages in self.rounds) * (world_size // node_size - 1)
        return messages + exchange_bytes(self.num_shared, world_size, node_size)


def exchange_bytes(num_shared: int, world_size: int, node_size: int = 1) -> int:
    """What a rank sends in the all-reduce of the absmax of shared channels, in fp32: between nodes, of its share."""
    num_nodes = world_size // node_size
    return 2 * 4 * -(-num_shared // node_size) * (num_nodes - 1) // num_nodes


def build(
    weights: Sequence[Weight], numel: int, world_size: int, itemsize: int, round_numel: int = ROUND_NUMEL
) -> WeightLayout:
    """The layout of a flat group of `numel` elements of `itemsize` bytes, cut into world_size equal partitions.

    Raises ValueError where they are not equal, or `weights` are not in the order of the group.
    """
    if numel % world_size:
        raise ValueError(
            f"weight_layout.build(numel): got {numel} elements for {world_size} ranks; allowed: multiples; pad them"
        )
    size = numel // world_size
    rounds = max(1, -(-size // round_numel))
    runs: list[list[list[Run]]] = [[[] for _ in range(world_size)] for _ in range(rounds)]
    shared, position = _Shared(), 0
    for weight in weights:
        length = _numel(weight.shape)
        if weight.start < position or weight.start + length > numel:
            raise ValueError(
                f"weight_layout.build(weights): got {weight.name!r} at {weight.start}; allowed: {position} to "
                f"{numel - length}; give them in the order of the group"
            )
        position = weight.start + length
        begin = 0
        while begin < length:
            owner = (weight.start + begin) // size
            end = min(length, (owner + 1) * size - weight.start)
            for run in _runs(weight, begin, end, shared, round_numel):
                runs[(run.start - owner * size) // round_numel][owner].append(run)
            begin = end
    placed = tuple(tuple(_placed(of_owner, itemsize) for of_owner in of_round) for of_round in runs)
    return WeightLayout(placed, shared.count)


class _Shared:
    """Numbers of channels that lie in several partitions."""

    def __init__(self) -> None:
        self.count = 0
        self._first: dict[tuple[str, int], int] = {}

    def first(self, name: str, row: int, count: int) -> int:
        if (name, row) not in self._first:
            self._first[name, row] = self.count
            self.count += count
        return self._first[name, row]


def _runs(weight: Weight, begin: int, end: int, shared: _Shared, round_numel: int) -> Iterator[Run]:
    """Elements begin to end of a weight, which one partition has."""
    coding = weight.coding
    if coding is None:
        for first in range(begin, end, round_numel):
            yield _run("whole", weight, first, min(first + round_numel, end))
        return
    width = weight.shape[1]
    if coding.side == "column":
        if end - begin == _numel(weight.shape):
            yield _run("columns", weight, begin, end)
        else:
            channel = shared.first(weight.name, 0, width)
            yield _run("shared", weight, begin, end, channel, begin % width)
        return
    first_row, last_row = -(-begin // width), end // width
    if first_row > last_row:  # within one row
        yield _run("shared", weight, begin, end, shared.first(weight.name, last_row, 1))
        return
    if begin < first_row * width:
        yield _run("shared", weight, begin, first_row * width, shared.first(weight.name, first_row - 1, 1))
    step = max(1, round_numel // width)
    for row in range(first_row, last_row, step):
        yield _run("rows", weight, row * width, min(row + step, last_row) * width)
    if last_row * width < end:
        yield _run("shared", weight, last_row * width, end, shared.first(weight.name, last_row, 1))


def _run(
    kind: Literal["rows", "columns", "shared", "whole"],
    weight: Weight,
    begin: int,
    end: int,
    first_channel: int = -1,
    first_column: int = -1,
) -> Run:
    bits = weight.coding.bits if weight.coding else 0
    width = weight.shape[1] if weight.coding else 0
    return Run(kind, weight.start + begin, end - begin, bits, width, first_channel, first_column, 0, 0)


def _placed(runs: Sequence[Run], itemsize: int) -> Message:
    """The message of `runs`: the absmax of all, the whole elements of all, the codes of all."""
    absmax_at = 0
    at = itemsize * sum(run.num_channels for run in runs)
    codes_at = at + itemsize * sum(run.numel for run in runs if run.kind == "whole")
    placed = []
    for run in runs:
        if run.kind == "whole":
            placed.append(run._replace(at=at))
            at += itemsize * run.numel
        else:
            placed.append(run._replace(absmax_at=absmax_at, at=codes_at))
            absmax_at += itemsize * run.num_channels
            codes_at += run.num_bytes
    return Message(tuple(placed), codes_at)


def _numel(shape: Sequence[int]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel
