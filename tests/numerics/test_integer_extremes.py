"""Integer quantization of constants, zeros, denormals and the largest numbers."""

import itertools
import math

import pytest
import torch
from numerics.integer_inputs import BITS, DTYPES, FLOAT32_MAX, GRANULARITIES, ROUNDINGS, SYMMETRIC, TINY, assert_close

from ds_quant.numerics import dequantize, fake_quantize, fold_key, quantize


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", BITS)
def test_constant_groups_are_exact(bits, granularity):
    for dtype, value in itertools.product(DTYPES, (0.0, 1.0, -3.3, 1e-7, 6e4, -6e4, 3e38, 1e-38, 1e-45, -1e-40)):
        x = torch.full((3, 20), value).to(dtype)
        if x.isfinite().all():
            options = {"granularity": granularity, "block_size": 16, "symmetric": False}
            assert torch.equal(fake_quantize(x, bits, **options), x)
            assert torch.equal(fake_quantize(x, bits, rounding="stochastic", key=fold_key(1), **options), x)


def test_groups_of_zeros_have_scale_zero():
    for symmetric, granularity in itertools.product(SYMMETRIC, GRANULARITIES):
        q = quantize(torch.tensor([[0.0, -0.0]] * 3), 4, granularity=granularity, block_size=16, symmetric=symmetric)
        assert (q.scale == 0).all()
        assert (q.codes == 0).all()
        assert q.zero_point is None or (q.zero_point == 0).all()
        assert (dequantize(q) == 0).all()


@pytest.mark.parametrize("symmetric", SYMMETRIC)
@pytest.mark.parametrize("bits", BITS)
def test_denormals_keep_an_error_of_half_a_scale(bits, symmetric):
    levels = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    for count in (1, 2, 3, 126, 127, 128, 180, 255, 256, 400, 12345, 2**23 - 1, 2**23, 2**24, 2**29):
        x = torch.tensor([count, -(count // 3), count // 7, 0, count // 2], dtype=torch.float64).mul(TINY).float()
        q = quantize(x, bits, symmetric=symmetric)
        extent = (x.max() - x.min() if not symmetric else x.abs().max()).double() / TINY
        # No scale may be wider than the range asks for, rounded up to a denormal step.
        assert 1 <= q.scale.double() / TINY <= math.ceil(extent / levels * (1 + 2.0**-23))
        assert_close(x, q, "nearest")
        assert (dequantize(q).double() - x.double()).abs().max() <= q.scale.double() * (0.5 + levels * 2.0**-23)


def test_flushed_denormals_become_zero_and_nothing_worse():
    x = torch.tensor([[1e-40, -1e-42, 0.0], [2e-38, 0.0, -1e-39], [1.0, -0.5, 1e-40]])
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        for bits, symmetric, rounding in itertools.product(BITS, SYMMETRIC, ROUNDINGS):
            key = fold_key(1) if rounding == "stochastic" else None
            values = fake_quantize(x, bits, granularity="row", symmetric=symmetric, rounding=rounding, key=key)
            assert values[0].tolist() == [0, 0, 0]
            assert values[:2].abs().max() <= 2e-38
            assert values[2, 0] == pytest.approx(1.0, abs=0.51)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_numbers_do_not_overflow(dtype, rng):
    limit = torch.finfo(dtype).max
    for bits, symmetric, rounding in itertools.product(BITS, SYMMETRIC, ROUNDINGS):
        for low in (-limit, -limit / 2, -limit / 1000, 0.0, limit / 3, limit * (1 - 2.0**-7)):
            x = torch.tensor([low, limit, *rng.uniform(low, limit, size=20)]).to(dtype).clamp(-limit, limit)
            key = fold_key(int(rng.integers(2**63))) if rounding == "stochastic" else None
            q = quantize(x, bits, symmetric=symmetric, rounding=rounding, key=key)
            assert q.scale.isfinite()
            assert dequantize(q, dtype).isfinite().all()
            assert dequantize(q).isfinite().all()
            assert_close(x.float(), q, rounding)


@pytest.mark.parametrize("sign", [1, -1])
def test_narrow_ranges_next_to_the_largest_number_do_not_overflow(sign, rng):
    # Here the few ulp that a far offset costs exceed a scale.
    for exponent, bits, _ in itertools.product(range(14, 25), BITS, range(10)):
        x = torch.from_numpy(sign * FLOAT32_MAX * (1 - 2.0**-exponent * rng.uniform(size=50))).float()
        x[0] = sign * FLOAT32_MAX
        q = quantize(x, bits, symmetric=False)
        assert dequantize(q).isfinite().all()
        assert_close(x, q, "nearest")


def test_dequantize_overflows_like_a_cast_beyond_rounding():
    q = quantize(torch.tensor([1e6, -1e6, 100.0]), 8)
    assert dequantize(q, torch.float16).tolist() == [math.inf, -math.inf, 0]


def test_narrow_ranges_far_from_zero_stay_close(rng):
    for offset_value, width in itertools.product((1.0, -1e30, 3e-38, 1e4), (2.0**-24, 2.0**-23, 2.0**-20, 2.0**-10)):
        x = torch.from_numpy(offset_value * (1 + rng.uniform(0, width, size=100))).float()
        for bits in (2, 8):
            assert_close(x, quantize(x, bits, symmetric=False), "nearest")
