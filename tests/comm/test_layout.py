"""Which rank gets what, and where it lies in the messages: counted again, element by element and byte by byte."""

import numpy as np
import pytest

from ds_quant.comm import layout
from ds_quant.comm.layout import Piece, Span, build, cut_each, cut_evenly, whole
from ds_quant.numerics.wire import WireFormat

FORMATS = [WireFormat(8, 256), WireFormat(4, 128), WireFormat(8, 32, "hadamard"), WireFormat(4, 32)]
FORMATS += [WireFormat(4, 32, format="mxfp4"), WireFormat(4, 16, format="nvfp4")]
WORLD_SIZES = (1, 2, 3, 4, 5, 6, 7, 8)


def random_spans(rng, count, largest):
    """Parameters and runs of parameters in a few tensors, gaps between them, some of no elements."""
    spans, ends = [], [0, 0, 0]
    for number in range(count):
        source, numel = int(rng.integers(3)), int(rng.integers(largest + 1))
        start = ends[source] + int(rng.integers(5))
        spans.append(Span(f"p{number}", int(rng.integers(1000)), source, start, numel))
        ends[source] = start + numel
    return spans


def cuts(spans, fmt, world_size):
    yield "evenly", cut_evenly(spans, fmt, world_size)
    yield "each", cut_each(spans, world_size)
    yield "whole", whole(spans, world_size - 1)


def scales_of(numel, fmt):
    """Bytes of a piece's scales, block by block."""
    each = {"": 4, "mxfp4": 1, "nvfp4": 1}[fmt.format]
    return sum(each for _ in range(0, numel, fmt.block_size)) + 4 * (fmt.format == "nvfp4")


def bytes_of(pieces, fmt):
    """A message's size by the formula of the module docstring, counted block by block and code by code."""
    scales = sum((scales_of(piece.numel, fmt) + 3) // 4 * 4 for piece in pieces)
    codes = sum(piece.numel if fmt.bits == 8 else (piece.numel + 1) // 2 for piece in pieces)
    return (scales + codes + 3) // 4 * 4


def check_cover(spans, pieces):
    """Each piece lies in its span, names what lies there, and every element of every span is in one piece."""
    for span in spans:
        within = [piece for piece in pieces if piece.name == span.name and piece.numel]
        assert all(piece.source == span.source for piece in within)
        assert all(piece.offset - span.offset == piece.start - span.start for piece in within), "one shift for both"
        at = span.start
        for piece in sorted(within, key=lambda piece: piece.start):
            assert piece.start == at
            at += piece.numel
        assert at == span.start + span.numel
    assert {piece.name for piece in pieces} <= {span.name for span in spans}


def check_places(parts, fmt, num_bytes):
    """The scales and codes of no two pieces share a byte, and none lies outside."""
    taken = np.zeros(num_bytes, dtype=np.int64)
    for numel, scale_at, codes_at in zip(parts.numel, parts.scale_at, parts.codes_at, strict=True):
        assert scale_at % 4 == 0
        for begin, length in (
            (scale_at, scales_of(numel, fmt)),
            (codes_at, numel if fmt.bits == 8 else (numel + 1) // 2),
        ):
            assert begin + length <= num_bytes
            taken[begin : begin + length] += 1
    assert taken.max(initial=0) <= 1
    return int(taken.sum())


def rows(parts):
    return list(zip(*(column.tolist() for column in parts), strict=True))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_layouts_of_random_spans(rng, world_size, fmt):
    for count, largest in ((1, 3), (1, 5000), (7, 700), (30, 90), (3, 0)):
        spans = random_spans(rng, count, largest)
        for name, pieces in cuts(spans, fmt, world_size):
            check_cover(spans, pieces)
            layouts = [build(pieces, fmt, world_size, rank) for rank in range(world_size)]
            kept = [piece for piece in pieces if piece.numel]
            for rank, found in enumerate(layouts):
                assert list(found.pieces) == kept
                assert found.message_bytes == tuple(
                    bytes_of([piece for piece in kept if piece.owner == owner], fmt) for owner in range(world_size)
                ), name
                assert list(found.own_pieces) == [piece for piece in kept if piece.owner == rank]
                assert sorted(found.sent_pieces + found.own_pieces) == sorted(kept)
                assert found.own_numel + found.sent_numel == sum(piece.numel for piece in kept)
                assert found.own_bytes == found.message_bytes[rank]
                assert found.slot_bytes == max(found.message_bytes)
                # What lies between parts is padding: at most 3 bytes a message, and a piece whose scales take 1 byte.
                used = check_places(found.sent, fmt, sum(found.send_splits))
                padded = world_size + (len(found.sent_pieces) if fmt.format else 0)
                assert sum(found.send_splits) - 3 * padded <= used
                check_places(found.own, fmt, found.own_bytes)
                check_places(found.gathered, fmt, world_size * found.slot_bytes)
                assert found.sent.numel.tolist() == [piece.numel for piece in found.sent_pieces]
                assert found.own.numel.tolist() == [piece.numel for piece in found.own_pieces]
            check_pairs(layouts)


def check_pairs(layouts):
    """What each rank sends to each other is, in length and place, what that one expects."""
    world_size = len(layouts)
    for sender in layouts:
        assert sender.send_splits[sender.rank] == 0
        sent = dict(zip(sender.sent_pieces, rows(sender.sent), strict=True))
        gathered = sender.gathered
        places = {row[-1]: row for row in rows(gathered)}  # by stream, one a piece
        for receiver in layouts:
            begin = sum(sender.send_splits[: receiver.rank])
            if receiver.rank != sender.rank:
                assert sender.send_splits[receiver.rank] == receiver.receive_splits[sender.rank]
                for piece, (*what, scale_at, codes_at, stream) in zip(
                    receiver.own_pieces, rows(receiver.own), strict=True
                ):
                    assert sent[piece] == (*what, scale_at + begin, codes_at + begin, stream)
            # The reduced message lies in the gathered ones at the owner's slot.
            slot = receiver.rank * sender.slot_bytes
            for *what, scale_at, codes_at, stream in rows(receiver.own):
                assert places[stream] == (*what, scale_at + slot, codes_at + slot, stream)
        assert len(rows(gathered)) == len(sender.pieces)
    assert all(len(layout.receive_splits) == len(layout.send_splits) == world_size for layout in layouts)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_even_shares(rng, fmt):
    """No rank has more than its share, up to a block; shares begin at multiples of the block."""
    for world_size in (*WORLD_SIZES, 1024):
        spans = random_spans(rng, 5, 40000)
        total = sum(span.numel for span in spans)
        pieces = cut_evenly(spans, fmt, world_size)
        owned = np.bincount([piece.owner for piece in pieces], [piece.numel for piece in pieces], world_size)
        assert owned.max() < total / world_size + fmt.block_size
        assert [piece.owner for piece in pieces] == sorted(piece.owner for piece in pieces)
        assert all(amount % fmt.block_size == 0 for amount in np.cumsum(owned)[:-1] if amount < total)


def test_cut_each_is_a_chunk_of_each_span_a_rank():
    """As stage 3 does: ceil(numel / world_size) elements, the last ranks get less or nothing."""
    pieces = cut_each([Span("a", 10, 0, 3, 10), Span("b", 0, 1, 0, 2)], 4)
    assert [(piece.offset, piece.source, piece.start, piece.numel, piece.owner) for piece in pieces] == [
        *((10, 0, 3, 3, 0), (13, 0, 6, 3, 1), (16, 0, 9, 3, 2), (19, 0, 12, 1, 3)),
        *((0, 1, 0, 1, 0), (1, 1, 1, 1, 1), (2, 1, 2, 0, 2), (2, 1, 2, 0, 3)),
    ]


@pytest.mark.parametrize("cut", ["evenly", "each"])
@pytest.mark.parametrize("rank", [0, 517, 1023])
def test_a_thousand_ranks(rng, rank, cut):
    fmt, world_size = WireFormat(4, 256), 1024
    spans = random_spans(rng, 6, 400_000)
    pieces = dict(cuts(spans, fmt, world_size))[cut]
    check_cover(spans, pieces)
    found = build(pieces, fmt, world_size, rank)
    owned = [[] for _ in range(world_size)]
    for piece in pieces:
        owned[piece.owner].append(piece)
    assert found.message_bytes == tuple(bytes_of(some, fmt) for some in owned)
    check_places(found.sent, fmt, sum(found.send_splits))
    check_places(found.gathered, fmt, world_size * found.slot_bytes)
    others = [build(pieces, fmt, world_size, other) for other in (0, rank // 2, 1022)]
    assert all(other.message_bytes == found.message_bytes for other in others)
    assert all(other.pieces == found.pieces for other in others)
    for other in others:
        if other.rank != rank:
            assert found.send_splits[other.rank] == other.receive_splits[rank]
            begin = sum(found.send_splits[: other.rank])
            sent = dict(zip(found.sent_pieces, rows(found.sent), strict=True))
            for piece, (*what, scale_at, codes_at, stream) in zip(other.own_pieces, rows(other.own), strict=True):
                assert sent[piece] == (*what, scale_at + begin, codes_at + begin, stream)


def test_streams_belong_to_name_and_offset():
    """Not to the tensor, the bucket or the owner: how gradients are bucketed leaves random bits alone."""
    fmt = WireFormat(8, 32)
    one = build([Piece("a", 5, 0, 0, 40, 0), Piece("b", 5, 0, 40, 40, 0)], fmt, 2, 0).gathered
    other = build([Piece("b", 5, 0, 0, 40, 1), Piece("a", 5, 3, 7, 90, 0)], fmt, 2, 0).gathered
    assert set(one.stream.tolist()) == set(other.stream.tolist())
    assert len(set(one.stream.tolist())) == 2
    assert build([Piece("a", 6, 0, 0, 40, 0)], fmt, 2, 0).own.stream[0] not in one.stream


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("pieces", [[], [Piece("a", 0, 0, 0, 7, 0), Piece("b", 0, 0, 7, 9, 0)]], ids=["none", "two"])
def test_columns_have_the_types_that_kernels_take(pieces, world_size):
    for rank in range(world_size):
        found = build(pieces, WireFormat(4, 32), world_size, rank)
        for parts, count in (
            (found.sent, len(found.sent_pieces)),
            (found.own, len(found.own_pieces)),
            (found.gathered, len(pieces)),
        ):
            for name, column in parts._asdict().items():
                assert isinstance(column, np.ndarray)
                assert column.dtype == (np.uint64 if name == "stream" else np.int64)
                assert column.shape == (count,)
        assert (found.own_bytes == 0) == (not found.own_pieces)


@pytest.mark.parametrize("owner", [-1, 2])
def test_owners_outside_of_the_group_are_refused(owner):
    with pytest.raises(ValueError, match=rf"got owner {owner} of 'a'; allowed: 0 to 1;"):
        layout.build([Piece("a", 0, 0, 0, 7, owner)], WireFormat(8, 32), 2, 0)
