"""Two levels: every element passes inside and between the nodes exactly once, and all ranks read what was written."""

from itertools import accumulate
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import distributed as torch_dist
from torch.distributed import distributed_c10d

from ds_quant.base.errors import ConfigError
from ds_quant.comm import backend
from ds_quant.comm.hierarchy import Nodes, check_nodes, make_nodes, ranks_per_node, two_level
from ds_quant.comm.layout import Span, build, cut_each, cut_evenly
from ds_quant.numerics.wire import WireFormat, code_bytes, num_blocks

SPANS = [Span("a", 0, 0, 0, 1000), Span("b", 3, 1, 5, 7), Span("c", 0, 0, 1000, 4097), Span("d", 0, 1, 12, 300)]


def levels_of(pieces, fmt, world_size, size, ranks=None):
    """The two levels of each rank."""
    found = {}
    for rank in range(world_size) if ranks is None else ranks:
        nodes = Nodes(size, world_size // size, rank // size, rank % size, None, None)
        found[rank] = two_level(build(pieces, fmt, world_size, rank), nodes)
    return found


def bytes_of_parts(parts, fmt):
    """Every byte that a part takes, by piece; asserts that none is taken twice."""
    taken = set()
    for numel, scale_at, codes_at in zip(
        parts.numel.tolist(), parts.scale_at.tolist(), parts.codes_at.tolist(), strict=True
    ):
        own = {*range(scale_at, scale_at + 4 * num_blocks(numel, fmt))}
        own |= {*range(codes_at, codes_at + code_bytes(numel, fmt))}
        assert not own & taken
        taken |= own
    return taken


@pytest.mark.parametrize("fmt", [WireFormat(8, 256), WireFormat(4, 32, "hadamard")], ids=str)
@pytest.mark.parametrize(("world_size", "size"), [(4, 2), (8, 2), (8, 4), (6, 3)])
@pytest.mark.parametrize("cut", ["evenly", "each"])
def test_every_piece_is_in_exactly_one_place(world_size, size, fmt, cut):
    pieces = cut_evenly(SPANS, fmt, world_size) if cut == "evenly" else cut_each(SPANS, world_size)
    kept = [piece for piece in pieces if piece.numel]
    levels = levels_of(pieces, fmt, world_size, size)
    for rank, found in levels.items():
        # Inside: each number of the node sums up what its likes in all nodes own.
        assert sorted(piece for chunk in found.chunks for piece in chunk) == sorted(kept)
        for number, chunk in enumerate(found.chunks):
            assert all(piece.owner % size == number for piece in chunk)
        assert found.chunk_numel == max(sum(piece.numel for piece in chunk) for chunk in found.chunks)
        # Between: that chunk, its pieces one after the other, cut among the nodes as the whole was.
        chunk, between = found.chunks[rank % size], found.between
        assert (between.world_size, between.rank) == (world_size // size, rank // size)
        starts = [0, *accumulate(piece.numel for piece in chunk)][: len(chunk)]
        assert list(between.pieces) == [
            piece._replace(source=0, start=start, owner=piece.owner // size)
            for piece, start in zip(chunk, starts, strict=True)
        ]
        own = [(piece.name, piece.offset, piece.numel) for piece in between.own_pieces]
        assert own == [(piece.name, piece.offset, piece.numel) for piece in kept if piece.owner == rank]
        # Back: all pieces, where they came from, each at a place of its own.
        places = zip(*(column.tolist() for column in found.gathered[:3]), strict=True)
        assert sorted(places) == sorted((piece.source, piece.start, piece.numel) for piece in kept)
        assert max(bytes_of_parts(found.gathered, fmt), default=-1) < size * found.slot_bytes
        assert found.slot_bytes >= between.world_size * between.slot_bytes


@pytest.mark.parametrize("cut", ["evenly", "each"])
@pytest.mark.parametrize(
    ("world_size", "size", "ranks"),
    [(4, 2, None), (8, 4, None), (8, 2, None), (1024, 8, (0, 5, 511, 1016, 1023))],
)
def test_what_one_rank_writes_another_finds(world_size, size, ranks, cut):
    """Follows each piece from its owner's message through both all-gathers, for every reader."""
    fmt = WireFormat(4, 32)
    spans = SPANS if ranks is None else [Span("a", 0, 0, 0, 300_000), Span("b", 0, 1, 7, 2000)]
    pieces = cut_evenly(spans, fmt, world_size) if cut == "evenly" else cut_each(spans, world_size)
    levels = levels_of(pieces, fmt, world_size, size, ranks)
    slots = {found.slot_bytes for found in levels.values()}
    assert len(slots) == 1, "an all-gather has equal slots"
    assert len({found.chunk_numel for found in levels.values()}) == 1, "and so has a reduce-scatter"
    for reader in levels.values():
        found = {
            (source, start): (numel, scale_at, codes_at, stream)
            for source, start, numel, scale_at, codes_at, stream in zip(
                *(column.tolist() for column in reader.gathered), strict=True
            )
        }
        for owner, writer in levels.items():
            node, number = divmod(owner, size)
            begin = number * reader.slot_bytes + node * writer.between.slot_bytes
            originals = [piece for piece in writer.chunks[number] if piece.owner == owner]
            own = zip(*(column.tolist() for column in writer.between.own[2:]), strict=True)
            for piece, (numel, scale_at, codes_at, stream) in zip(originals, own, strict=True):
                expected = (numel, scale_at + begin, codes_at + begin, stream)
                assert found[piece.source, piece.start] == expected
    for a, sender in levels.items():
        for b, receiver in levels.items():
            if a != b and a % size == b % size:
                assert sender.between.send_splits[b // size] == receiver.between.receive_splits[a // size]
                assert sender.between.pieces == receiver.between.pieces


def test_streams_are_those_of_one_level():
    """Random bits belong to name and offset, at either level."""
    fmt = WireFormat(8, 32)
    pieces = cut_evenly(SPANS, fmt, 4)
    found = levels_of(pieces, fmt, 4, 2)[0]
    assert set(found.gathered.stream.tolist()) == set(found.whole.gathered.stream.tolist())


def test_nothing_to_reduce():
    found = levels_of([], WireFormat(8, 32), 4, 2)[1]
    assert (found.chunk_numel, found.slot_bytes) == (0, 0)
    assert all(column.dtype == (np.uint64 if i == 5 else np.int64) for i, column in enumerate(found.gathered))


@pytest.mark.parametrize(("world_size", "size"), [(4, 3), (4, 4), (4, 8), (2, 2), (1024, 24)])
def test_nodes_that_do_not_fit_are_refused(world_size, size):
    with pytest.raises(ConfigError, match=rf"hierarchical: got {size}; allowed: a divisor of the {world_size} ranks"):
        check_nodes(world_size, size)


def test_groups_of_nodes_wait_for_no_rank_outside(monkeypatch):
    """Also where the job's group is bound to a device: torch would split new ones off from it, with all its ranks."""
    job = SimpleNamespace(bound_device_id=torch.device("cuda", 1))
    group, calls, names = object(), [], distributed_c10d._world.pg_names
    before = dict(names)

    def new_group(ranks, **options):
        calls.append((ranks, options, job.bound_device_id))
        # Names are made of this number, which must be the same on all ranks: the others' largest.
        assert len(names) == len(before) + 3
        if len(calls) == 4:
            raise RuntimeError("no network")

    monkeypatch.setattr(torch_dist, "group", SimpleNamespace(WORLD=job))
    monkeypatch.setattr(torch_dist, "get_world_size", lambda group: 4)
    monkeypatch.setattr(torch_dist, "get_rank", lambda group: 3)
    monkeypatch.setattr(torch_dist, "get_process_group_ranks", lambda group: [1, 2, 5, 6])
    monkeypatch.setattr(torch_dist, "new_group", new_group)
    monkeypatch.setattr(backend, "gather_objects", lambda count, group: [count, count + 3, count + 1, count])
    found = make_nodes(group, 2)
    assert found[:4] == (2, 2, 1, 1)
    alone = {"use_local_synchronization": True}
    assert calls == [([5, 6], alone, None), ([2, 6], alone, None)]
    assert job.bound_device_id == torch.device("cuda", 1)
    with pytest.raises(RuntimeError, match="no network"):
        make_nodes(group, 2)
    assert job.bound_device_id == torch.device("cuda", 1)
    assert names == before


@pytest.mark.parametrize(("world_size", "size"), [(4, 2), (8, 4), (1024, 8)])
def test_nodes_that_fit(world_size, size):
    assert check_nodes(world_size, size) is None


def test_true_is_what_the_launcher_says(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert ranks_per_node(True) == 4
    assert ranks_per_node(2) == 2
    assert ranks_per_node(False) == 0
    for value in ("", "0", "-1", "four"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", value)
        with pytest.raises(ConfigError, match="hierarchical: got true; allowed: true where the launcher sets"):
            ranks_per_node(True)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    with pytest.raises(ConfigError, match="write the number of ranks in a node"):
        ranks_per_node(True)
