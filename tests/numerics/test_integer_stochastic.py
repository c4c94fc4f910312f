"""Stochastic rounding to integers: unbiased, within the codes, repeated by its key."""

import pytest
import torch
from numerics.integer_inputs import BITS, DTYPES, SYMMETRIC

from ds_quant.numerics import fold_key, integer_values, quantize


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", SYMMETRIC)
def test_stochastic_rounding_is_unbiased(symmetric, dtype):
    num_keys, num_copies = 30, 100
    x = torch.cat((torch.tensor([-1.0, 1.0]), torch.linspace(-0.97, 0.97, 62))).to(dtype)
    copies = x.repeat(num_copies)  # each element has bits of its own
    draws = [
        integer_values(quantize(copies, 4, symmetric=symmetric, rounding="stochastic", key=fold_key(1, step)))
        for step in range(num_keys)
    ]
    steps = torch.cat(draws).reshape(-1, 64).double()
    exact = x.double() / quantize(x, 4, symmetric=symmetric).scale.double()
    fraction = exact - exact.floor()
    # The range is symmetric about zero, so the asymmetric zero point falls on a tie and the clamp cuts at the ends.
    inner = slice(2, None) if symmetric else slice(6, -4)
    deviation = (fraction * (1 - fraction) / len(steps)).sqrt()
    error = steps.mean(0) - exact
    assert (error[inner].abs() <= 5 * deviation[inner] + 2.0**-24).all()
    assert error[inner].mean().abs() <= 5 * (deviation[inner] ** 2).sum().sqrt() / deviation[inner].numel()
    # Only the two neighbours are met, and both of them.
    assert torch.equal(steps.min(0).values[inner], exact.floor()[inner])
    assert torch.equal(steps.max(0).values[inner], exact.ceil()[inner])


@pytest.mark.parametrize("symmetric", SYMMETRIC)
def test_stochastic_rounding_never_moves_integers(symmetric):
    for bits in BITS:
        top = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
        x = torch.arange(-top if symmetric else 0, top + 1).float() * 0.125
        for step in range(100):
            # Key (0, 0) gives element 0 the least number there is, 0.
            key = fold_key(2, step) if step else torch.tensor([0, 0])
            q = quantize(x, bits, symmetric=symmetric, rounding="stochastic", key=key)
            assert torch.equal(integer_values(q) * 0.125, x)


def test_stochastic_rounding_stays_within_the_codes():
    # A float32 whose quotient by its own scale is 127 + 2^-17: one draw in 131072 rounds past the last code.
    x = torch.full((2**20,), -1.0000038146972656)
    assert x[0] / quantize(x, 8).scale < -127
    assert quantize(x, 8, rounding="stochastic", key=fold_key(3)).codes.unique().tolist() == [-127]
    assert quantize(-x, 8, rounding="stochastic", key=fold_key(3)).codes.unique().tolist() == [127]


def test_stochastic_rounding_repeats_with_its_key_and_differs_with_another():
    x = torch.linspace(-1, 1, 1001)
    first, again, other = (quantize(x, 4, rounding="stochastic", key=fold_key(seed)).codes for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
