"""The rotation of rows against dense matrices, and that it cancels in a product."""

import math

import numpy as np
import pytest
import torch
from numerics import oracle

from ds_quant.numerics.rotation import SIGN_KEY, rotate, rotate_rows, unrotate


def hadamard(length):
    """Sylvester's, orthonormal, float64."""
    matrix = np.ones((1, 1))
    while len(matrix) < length:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(length)


def dense(features, block):
    """[features, features], by which a row is multiplied."""
    signs = np.where([oracle.bits(SIGN_KEY, index) >> 31 for index in range(block)], -1.0, 1.0)
    parts = [1 << bit for bit in reversed(range(16)) if features % block >> bit & 1]
    whole, begin = np.zeros((features, features)), 0
    for size in [block] * (features // block) + parts:
        part = slice(begin, begin + size)
        whole[part, part] = np.diag(signs[np.arange(begin, begin + size) % block]) @ hadamard(size)
        begin += size
    return torch.from_numpy(whole)


def norm_lost(count):
    """The share of a norm that so many roundings in fp32, one after the other, change, and 2^-45 for the test's own."""
    return count * 2.0**-24 / (1 - count * 2.0**-24) + 2.0**-45


@pytest.mark.parametrize("features", [0, 1, 13, 16, 77, 128])
@pytest.mark.parametrize("block", [16, 32, 64])
def test_rows(features, block):
    x, y = torch.randn(5, features), torch.randn(3, features)
    rotated = rotate_rows(x, block)
    # A stage of additions, and the last product, round each number once: what that adds has at most 2^-24 of the norm,
    # which the stages keep up to the factor that 1 / sqrt(size) takes off, itself rounded. An element is off by no more
    # than its row. Products in float64 of up to 128 numbers lose less than 2^-45.
    once = norm_lost(math.log2(block) + 2)
    norms = x.double().norm(dim=1)
    assert ((rotated.double() - x.double() @ dense(features, block)).abs() <= once * norms[:, None]).all()
    twice = norm_lost(2 * (math.log2(block) + 2))
    for row, want, length in zip(x, rotated, norms, strict=True):
        assert torch.equal(rotate(row, block), want)
        assert ((unrotate(want, block).double() - row).abs() <= twice * length).all()
    exact = x.double() @ y.double().t()
    lost = (rotated.double() @ rotate_rows(y, block).double().t() - exact).abs()
    assert (lost <= twice * norms[:, None] * y.double().norm(dim=1)).all()


def test_what_is_not_finite_stays_in_its_block():
    x = torch.randn(2, 40)
    x[0, 3] = torch.inf
    rotated = rotate_rows(x, 16)
    assert not rotated[0, :16].isfinite().any()
    assert torch.equal(rotated[0, 16:], rotate_rows(x[:1], 16)[0, 16:])
    assert rotated[0, 16:].isfinite().all()
    assert rotated[1].isfinite().all()
