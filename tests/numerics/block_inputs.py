"""Inputs of quantization in blocks of every kind."""

import numpy as np
import torch

BLOCK_SIZE = 32
FLOAT32_MAX = torch.finfo(torch.float32).max


def normal(rng, length):
    return rng.normal(size=length) * 10.0 ** rng.uniform(-12, 4)


def wild(rng, length):
    """Magnitudes over the whole range of float32, denormals included."""
    return rng.choice([-1.0, 1.0], size=length) * 2.0 ** rng.uniform(-150, 127.9, size=length)


def denormal(rng, length):
    return rng.integers(-(10 ** rng.integers(1, 7)), 10 ** rng.integers(1, 7), size=length) * 2.0**-149


def huge(rng, length):
    return rng.choice([-1.0, 1.0], size=length) * rng.uniform(0.5, 1.0, size=length) * FLOAT32_MAX


def spread(rng, length):
    """Log-normal, as second moments are."""
    return rng.choice([-1.0, 1.0], size=length) * np.exp(3 * rng.normal(size=length)) * 1e-8


def zeros(rng, length):
    return np.where(np.arange(length) // BLOCK_SIZE % 2 == 0, rng.choice([0.0, -0.0], length), rng.normal(size=length))


def non_finite(rng, length):
    x = rng.normal(size=length)
    x[rng.random(length) < 0.02] = rng.choice([np.inf, -np.inf, np.nan])
    return x


KINDS = (normal, wild, denormal, huge, spread, zeros, non_finite)


def make_input(rng, kind, length, signed, dtype=torch.float32):
    with np.errstate(all="ignore"):
        x = torch.from_numpy(kind(rng, length).astype(np.float32))
    if kind is not non_finite:
        x = x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    return (x if signed else x.abs()).to(dtype)


def assert_equal(got, expected):
    """Bit for bit, except that a NaN equals a NaN; dtypes and shapes too."""
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    if got.dtype.is_floating_point:
        assert torch.equal(got.isnan(), expected.isnan())
        got, expected = got.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0)
        assert torch.equal(torch.signbit(got), torch.signbit(expected))
    assert torch.equal(got, expected)
