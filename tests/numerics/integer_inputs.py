"""Inputs of integer quantization of every kind, and what is compared with its oracle."""

import numpy as np
import torch

from ds_quant.numerics import dequantize, expand_scale, quantize

BITS = range(2, 9)
GRANULARITIES = ("tensor", "row", "column", "block")
SYMMETRIC = (True, False)
ROUNDINGS = ("nearest", "stochastic")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_SIZE = 16
TINY = 2.0**-149
FLOAT32_MAX = torch.finfo(torch.float32).max


def normal(rng, shape):
    return rng.normal(size=shape) * 10.0 ** rng.uniform(-6, 4)


def wild(rng, shape):
    """Magnitudes over the whole range of float32, denormals included."""
    return rng.choice([-1.0, 1.0], size=shape) * 2.0 ** rng.uniform(-150, 127.9, size=shape)


def denormal(rng, shape):
    return rng.integers(-(10 ** rng.integers(1, 9)), 10 ** rng.integers(1, 9), size=shape) * TINY


def huge(rng, shape):
    return rng.choice([-1.0, 1.0], size=shape) * rng.uniform(0.9, 1.0, size=shape) * FLOAT32_MAX


def offset(rng, shape):
    """A narrow range far from zero, down to the precision of float32."""
    return (
        10.0 ** rng.uniform(-3, 4) * rng.choice([-1.0, 1.0]) * (1 + rng.normal(size=shape) * 2 ** rng.uniform(-24, 0))
    )


def ties(rng, shape):
    """Multiples of half a step, so that ties and exact integers are met."""
    x = rng.integers(-254, 255, size=shape) / 2
    x.reshape(-1)[:1] = 127
    return x * 2.0 ** rng.integers(-20, 10)


def constants(rng, shape):
    return np.broadcast_to(rng.choice([0.0, -0.0, -3.3, 1e-45, 0.7, -1e-40]), shape).copy()


def zero_groups(rng, shape):
    if not shape:
        return np.zeros(())
    return np.where(rng.random(size=(*shape[:-1], 1)) < 0.5, 0.0, rng.normal(size=shape))


def non_finite(rng, shape):
    x = normal(rng, shape)
    hit = rng.random(size=shape) < 2 / max(8, x.size)
    hit.reshape(-1)[:1] = True
    return np.where(hit, rng.choice([np.inf, -np.inf, np.nan], size=shape), x)


KINDS = (normal, wild, denormal, huge, offset, ties, constants, zero_groups, non_finite)


def make_input(rng, kind, shape, dtype):
    with np.errstate(all="ignore"):
        x = torch.from_numpy(np.asarray(kind(rng, shape), dtype=np.float32).reshape(shape))
    if kind is not non_finite:
        limit = torch.finfo(dtype).max
        x = x.clamp(-limit, limit)
    return x.to(dtype)


def assert_equal(got, expected):
    """Bit for bit, except that a NaN equals a NaN; dtypes and shapes too."""
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    if got.dtype.is_floating_point:
        assert torch.equal(got.isnan(), expected.isnan())
        got, expected = got.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0)
    assert torch.equal(got, expected)


def assert_close(x, q, rounding):
    """Within half a scale (a whole one if stochastic) and what float32 itself loses at the group's magnitude."""
    scale = expand_scale(q).double().expand(x.shape)
    group = quantize(x, 8, granularity=q.granularity, block_size=q.block_size)
    absmax = expand_scale(group).double().expand(x.shape) * 127
    # With u = 2^-24, in units of u * absmax and to first order. Symmetric: x / scale and the product are rounded once
    # each, both at absmax at most: 2, and one for what is of second order.
    # Asymmetric: the code minus the zero point may pass 2^24 and be rounded, as is its product, at absmax + scale; no
    # scale is above 2/3 of absmax: 1 + 2 * 5/3 < 5. Where the clamp cuts the code of the largest element, the error is
    # that of the zero point, 1, of these two, which are at the largest element, 2, and what n scales lack of the range:
    # the difference and the quotient are rounded, at 2 absmax at most: 4. So 7, and one for second order.
    roundings = 3 if q.zero_point is None else 8
    bound = scale * (0.5 if rounding == "nearest" else 1) + roundings * 2.0**-24 * absmax + TINY
    error = (dequantize(q).double() - x.double()).abs()
    assert (error <= bound).all()
