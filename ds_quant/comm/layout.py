"""Which rank gets what of a gradient, and where in the messages it lies. Numbers only: no tensor, no process group.

What is reduced is cut into *pieces*: consecutive elements of one parameter's gradient that one rank, the owner, gets
the sum of. Blocks start with a piece, so no block mixes two parameters, and how gradients are bucketed changes neither
scales nor random bits of parameters that it leaves whole.

The message for an owner holds its pieces in order: the scales of all, then the codes of all. With n_i elements in piece
i, blocks of B and b bits its size in bytes is

    sum of 4 * ceil(n_i / B)  +  sum of codes_i        rounded up to a multiple of 4

with codes_i = n_i for 8 bits and ceil(n_i / 2) for 4. Formats whose scales take 8 bits have, in place of
4 * ceil(n_i / B), that many bytes of `wire.scale_bytes`, rounded up to a multiple of 4.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ds_quant.kernels.wire import Parts, WireFormat, code_bytes, scale_bytes


class Piece(NamedTuple):
    """Consecutive elements of a parameter that one rank owns."""

    name: str
    """Of the parameter; empty where it has none. Names residuals and random bits."""
    offset: int
    """First element within the parameter."""
    source: int
    """Index of the tensor that holds it."""
    start: int
    """First element within that tensor."""
    numel: int
    owner: int
    """Rank within the group."""


class Span(NamedTuple):
    """A parameter, or a run of its elements, within a tensor."""

    name: str
    offset: int
    source: int
    start: int
    numel: int


@dataclass(frozen=True, eq=False)
class Layout:
    """Pieces, and their places in the messages that `rank` sends, reduces and is handed."""

    pieces: tuple[Piece, ...]
    fmt: WireFormat
    world_size: int
    rank: int
    message_bytes: tuple[int, ...]
    """Of the message for each owner."""
    sent_pieces: tuple[Piece, ...]
    """Those of other owners, in the order of the messages."""
    sent: Parts
    """Their places in all messages one after the other, without the own one."""
    own_pieces: tuple[Piece, ...]
    own: Parts
    """Places of the own pieces in the own message."""
    gathered: Parts
    """Places of all pieces in the messages of all owners, one after the other at multiples of `slot_bytes`."""

    @cached_property
    def send_splits(self) -> list[int]:
        """Bytes that go to each rank; none to this one."""
        return [0 if owner == self.rank else size for owner, size in enumerate(self.message_bytes)]

    @cached_property
    def sent_bytes(self) -> int:
        return sum(self.send_splits)

    @cached_property
    def receive_splits(self) -> list[int]:
        """Bytes that come from each rank; none from this one."""
        return [0 if sender == self.rank else self.own_bytes for sender in range(self.world_size)]

    @cached_property
    def own_bytes(self) -> int:
        return self.message_bytes[self.rank]

    @cached_property
    def slot_bytes(self) -> int:
        """Of the longest message: an all-gather has equal slots."""
        return max(self.message_bytes, default=0)

    @cached_property
    def own_numel(self) -> int:
        return sum(piece.numel for piece in self.own_pieces)

    @cached_property
    def sent_numel(self) -> int:
        return sum(piece.numel for piece in self.sent_pieces)


def build(pieces: Sequence[Piece], fmt: WireFormat, world_size: int, rank: int) -> Layout:
    """The places of `pieces`, kept in their order within each owner's message. Pieces without elements are left out.

    Raises ValueError for an owner outside of the group.
    """
    pieces = tuple(piece for piece in pieces if piece.numel)
    by_owner: list[list[Piece]] = [[] for _ in range(world_size)]
    for piece in pieces:
        if not 0 <= piece.owner < world_size:
            raise ValueError(
                f"layout.build(pieces): got owner {piece.owner} of {piece.name!r}; allowed: 0 to {world_size - 1}; "
                "number the ranks within the group"
            )
        by_owner[piece.owner].append(piece)
    places = [_places(owned, fmt) for owned in by_owner]
    sizes = tuple(size for _, _, size in places)
    slot_bytes = max(sizes, default=0)
    others = [owner for owner in range(world_size) if owner != rank]
    begins = dict(zip(others, np.cumsum([0, *(sizes[owner] for owner in others)])[:-1], strict=True))
    return Layout(
        pieces,
        fmt,
        world_size,
        rank,
        sizes,
        tuple(piece for owner in others for piece in by_owner[owner]),
        _joined([(by_owner[owner], places[owner], int(begins[owner])) for owner in others]),
        tuple(by_owner[rank]),
        _joined([(by_owner[rank], places[rank], 0)]),
        _joined([(by_owner[owner], places[owner], owner * slot_bytes) for owner in range(world_size)]),
    )


def cut_evenly(spans: Sequence[Span], fmt: WireFormat, world_size: int) -> list[Piece]:
    """Pieces of equal shares for all ranks, up to a block: what an all-reduce is cut into."""
    total = sum(span.numel for span in spans)
    share = -(-total // world_size)
    share = -(-share // fmt.block_size) * fmt.block_size
    pieces, position = [], 0
    for span in spans:
        done = 0
        while done < span.numel:
            owner = (position + done) // share
            length = min(span.numel - done, (owner + 1) * share - position - done)
            pieces.append(Piece(span.name, span.offset + done, span.source, span.start + done, length, owner))
            done += length
        position += span.numel
    return pieces


def cut_each(spans: Sequence[Span], world_size: int) -> list[Piece]:
    """Pieces of ceil(numel / world_size) elements of every span: how stage 3 partitions a parameter."""
    pieces = []
    for span in spans:
        chunk = -(-span.numel // world_size)
        for owner in range(world_size):
            begin, end = min(owner * chunk, span.numel), min((owner + 1) * chunk, span.numel)
            pieces.append(Piece(span.name, span.offset + begin, span.source, span.start + begin, end - begin, owner))
    return pieces


def whole(spans: Sequence[Span], owner: int) -> list[Piece]:
    """Pieces that one rank owns all of: a reduce to it."""
    return [Piece(*span, owner) for span in spans]


def _places(pieces: Sequence[Piece], fmt: WireFormat) -> tuple[list[int], list[int], int]:
    """(scale_at, codes_at) of each piece within its message, and the size of the message."""
    at, scale_at, codes_at = 0, [], []
    for piece in pieces:
        scale_at.append(at)
        at += -(-scale_bytes(piece.numel, fmt) // 4) * 4
    for piece in pieces:
        codes_at.append(at)
        at += code_bytes(piece.numel, fmt)
    return scale_at, codes_at, -(-at // 4) * 4


def _joined(messages: Sequence[tuple[Sequence[Piece], tuple[list[int], list[int], int], int]]) -> Parts:
    """Parts of several messages, each with the byte that it begins at."""

    def column(values: Iterator[int], dtype: type = np.int64) -> np.ndarray:
        found: np.ndarray = np.fromiter(values, dtype)
        found.setflags(write=False)  # so that kernels may keep what they make of it
        return found

    rows = [(piece, begin) for pieces, _, begin in messages for piece in pieces]
    return Parts(
        column(piece.source for piece, _ in rows),
        column(piece.start for piece, _ in rows),
        column(piece.numel for piece, _ in rows),
        column(begin + at for _, (places, _, _), begin in messages for at in places),
        column(begin + at for _, (_, places, _), begin in messages for at in places),
        column((_stream(piece) for piece, _ in rows), np.uint64),
    )


def _stream(piece: Piece) -> int:
    """Names the random bits of a piece, the same in every layout that has it."""
    return int.from_bytes(hashlib.blake2b(f"{piece.offset}:{piece.name}".encode(), digest_size=8).digest(), "little")
