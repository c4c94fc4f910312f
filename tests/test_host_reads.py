"""The count of host reads sees each kind of them, and nothing else."""

import pytest
import torch
from helpers.host_reads import reads

X = torch.arange(6.0)
MASK = X > 2


def put(x=X):
    x.clone()[MASK] = 0.0


@pytest.mark.parametrize(
    "read",
    [
        lambda: X[0].item(),
        lambda: float(X[0]),
        lambda: bool(MASK.any()),
        lambda: X.tolist(),
        lambda: X.numpy(),
        lambda: X.cpu(),
        lambda: MASK.nonzero(),
        lambda: X[MASK],
        lambda: torch.masked_select(X, MASK),
        lambda: X.unique(),
        lambda: torch.repeat_interleave(X, MASK.long()),
        lambda: torch.equal(X, X),
        put,
    ],
)
def test_a_read_is_seen(read):
    with reads() as found:
        read()
    assert sum(found.values()) >= 1
    assert all(name.startswith("test_host_reads.py:") for name in found)


def test_nothing_else_is():
    with reads() as found:
        torch.where(MASK, X, 0.0).sum()
        X[torch.tensor([1, 2])]
        torch.repeat_interleave(torch.arange(3), torch.tensor([1, 2, 3]), output_size=6)
        X.masked_fill(MASK, 1.0)
    assert not found
