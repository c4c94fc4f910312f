"""What ranks are told that disagree. Ranks are threads here; real ones are in tests/distributed."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ds_quant.base.errors import ConfigError
from ds_quant.comm import backend
from ds_quant.comm.agreement import check_agreement


@pytest.fixture
def compare(monkeypatch):
    """compare(descriptions): what check_agreement raised on each rank, and how many bytes each gathered."""

    def run(descriptions):
        local, barrier = threading.local(), threading.Barrier(len(descriptions), timeout=10)
        said = [[None] * len(descriptions) for _ in range(2)]

        def gather(call, content):
            said[call][local.rank] = content
            barrier.wait()
            return list(said[call])

        monkeypatch.setattr(backend, "gather_bytes", lambda content, group, device: gather(0, content))
        monkeypatch.setattr(backend, "gather_objects", lambda content, group: gather(1, content))

        def rank_of(rank):
            local.rank = rank
            try:
                check_agreement("here", descriptions[rank], None, torch.device("cpu"))
            except ConfigError as error:
                return str(error)
            return None

        with ThreadPoolExecutor(len(descriptions)) as pool:
            return list(pool.map(rank_of, range(len(descriptions)))), said

    return run


def test_ranks_that_agree_send_digests_only(compare):
    raised, (digests, texts) = compare([{"bits": 8, "names": ["a"] * 1000}] * 4)
    assert raised == [None] * 4
    assert all(len(digest) == 16 for digest in digests)
    assert texts == [None] * 4


def test_the_order_of_keys_is_no_difference(compare):
    assert compare([{"a": 1, "b": 2}, {"b": 2, "a": 1}])[0] == [None, None]


@pytest.mark.parametrize("odd", [1, 2, 3])
def test_all_ranks_are_told_who_differs_and_where(compare, odd):
    descriptions = [[["layer.weight", number] for number in range(50)] for _ in range(4)]
    descriptions[odd][30][1] = 777
    raised, _ = compare(descriptions)
    assert len(set(raised)) == 1, "the same on all ranks"
    assert raised[0].startswith("here: got ...")
    assert "30]" in raised[0].partition(" on rank 0")[0]
    assert '777], ["layer.weight", 31]' in raised[0].partition(" on rank 0")[2]
    assert f"on rank {odd} of 4; allowed: the same on all ranks; fix: " in raised[0]


@pytest.mark.parametrize("descriptions", [([1, 2], [1, 2, 3]), ([1], []), ("a", "b"), (1, 1.5), (True, 1)])
def test_small_differences_count(compare, descriptions):
    raised, _ = compare(list(descriptions))
    assert all("allowed: the same on all ranks" in message for message in raised)


def test_rank_0_alone_against_all_others(compare):
    raised, _ = compare(["x", "y", "y"])
    assert "'\"x\"' on rank 0" in raised[2]
    assert "'\"y\"' on rank 1 of 3" in raised[2]
