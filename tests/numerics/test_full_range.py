"""Codes in the full range: against the definition in numpy, and against compressed-tensors, whose they are."""

import itertools

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize as server_fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from numerics import oracle

from ds_quant.numerics import dequantize, fake_quantize, fold_key, products, quantize
from ds_quant.numerics.integer import symmetric_levels

BITS = range(2, 9)
GRANULARITIES = ("tensor", "row", "column", "block")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((), (0,), (3, 0), (1,), (7, 13), (2, 3, 17))


def kinds(rng, shape):
    """Usual values, all of the largest magnitude, zeros between, near ties, denormals, not finite."""
    usual = rng.normal(size=shape) * 10.0 ** rng.uniform(-6, 4)
    yield usual
    yield rng.choice([-1.0, 1.0], size=shape) * rng.uniform(0.5, 2)
    yield np.where(rng.random(size=shape) < 0.5, 0.0, usual)
    yield np.zeros(shape)
    yield rng.integers(-255, 256, size=shape) / 2
    yield rng.integers(-1000, 1000, size=shape) * 2.0**-149
    yield rng.choice([-1.0, 1.0], size=shape) * 3.4e38
    yield np.where(rng.random(size=shape) < 0.1, rng.choice([np.inf, -np.inf, np.nan]), usual)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_codes_and_scales_equal_the_oracle(rng, granularity, bits):
    for (shape, key), dtype in zip(
        itertools.product(SHAPES, (None, fold_key(int(rng.integers(2**63))))), itertools.cycle(DTYPES), strict=False
    ):
        words = None if key is None else tuple(key.tolist())
        rounding = "nearest" if key is None else "stochastic"
        for array in kinds(rng, shape):
            with np.errstate(all="ignore"):
                x = torch.from_numpy(np.asarray(array, dtype=np.float32)).to(dtype)
            q = quantize(x, bits, granularity=granularity, block_size=16, rounding=rounding, key=key, full_range=True)
            codes, scale, _ = oracle.quantize(
                x.float().numpy(),
                bits,
                granularity=granularity,
                block_size=16,
                symmetric=True,
                key=words,
                full_range=True,
            )
            assert q.codes.dtype == torch.int8
            np.testing.assert_array_equal(q.codes.numpy(), codes)
            np.testing.assert_array_equal(q.scale.numpy(), scale)


@pytest.mark.parametrize("bits", BITS)
def test_all_codes_are_used_and_no_other(bits):
    half = 2 ** (bits - 1)
    steps = torch.arange(-half, half) + 0.5  # all between two codes, at both ends as well
    q = quantize(torch.cat([steps, -steps.abs().max().reshape(1)]), bits, full_range=True)
    assert q.scale == 1
    assert q.codes[:-1].tolist() == [round(step) if step < half - 1 else half - 1 for step in steps.tolist()]
    assert q.codes[-1] == -half
    drawn = quantize(steps.repeat(999), bits, rounding="stochastic", key=fold_key(1), full_range=True).codes
    assert sorted(set(drawn.tolist())) == list(range(-half, half))


def test_a_value_is_off_by_half_a_scale(rng):
    for bits in BITS:
        x = torch.from_numpy(rng.normal(size=(50, 33))).float()
        q = quantize(x, bits, granularity="row", full_range=True)
        narrow = quantize(x, bits, granularity="row")
        assert (q.scale < narrow.scale).all()
        # x / scale and the product are rounded once each, to 2^-24 of a magnitude of n scales at most.
        bound = q.scale * (0.5 + 2 * 2.0**-24 * 2**bits)
        assert ((dequantize(q) - x).abs() <= bound).all()


def server(x, bits, strategy, group_size=None):
    """What compressed-tensors' dynamic quantizer leaves of an input, as its linear layers call it."""
    args = QuantizationArgs(
        num_bits=bits, type="int", symmetric=True, strategy=strategy, dynamic=True, group_size=group_size
    )
    scale, zero_point = compute_dynamic_scales_and_zp(x, args, torch.nn.Linear(1, 1))
    return server_fake_quantize(x, scale, zero_point, args)


@pytest.mark.parametrize(
    ("granularity", "strategy", "group_size"),
    [("row", "token", None), ("tensor", "tensor", None), ("block", "group", 16)],
)
@pytest.mark.parametrize("bits", BITS)
def test_values_are_those_of_compressed_tensors(rng, bits, granularity, strategy, group_size):
    """Bit for bit in fp32: [batch, tokens, features], rows of zeros and of one magnitude, over forty orders."""
    for _ in range(20):
        x = rng.normal(size=(3, 8, 48)) * 10.0 ** rng.uniform(-20, 20, size=(1 if granularity == "tensor" else 3, 1, 1))
        x[0, 2] = 0.0
        x[1, 3] = np.abs(x[1, 3]).max() * rng.choice([-1.0, 1.0], size=48)
        x[2, 4, :40] = 0.0
        x = torch.from_numpy(x).float()
        got = fake_quantize(x, bits, granularity=granularity, block_size=16, full_range=True)
        assert torch.equal(got, server(x, bits, strategy, group_size))
    assert not torch.equal(fake_quantize(x, bits, granularity=granularity, block_size=16), got)


def test_where_a_scale_is_denormal_ours_covers_the_group():
    """The one departure from compressed-tensors, below 2^-119: its scale is rounded down to less than x needs."""
    x = torch.tensor([[[190.0, -190.0, 3.0]]]) * 2.0**-149
    assert (server(x, 8, "token") - x).abs().max() == 63 * 2.0**-149
    assert torch.equal(fake_quantize(x, 8, granularity="row", full_range=True)[..., :2], x[..., :2])
    for exponent in (-119, -100):
        x = torch.tensor([[[1.9, -1.9, 0.3]]]) * 2.0**exponent
        assert torch.equal(fake_quantize(x, 8, granularity="row", full_range=True), server(x, 8, "token"))


def test_rows_columns_and_tensors_of_int8_products(rng):
    """`numerics.products` gives the same codes."""
    x = torch.from_numpy(rng.normal(size=(9, 40))).float()
    factor = torch.from_numpy(rng.uniform(0.1, 2, size=40)).float()
    for bits, key in itertools.product(BITS, (None, fold_key(3))):
        levels = symmetric_levels(bits, full_range=True)
        options = {"rounding": "nearest" if key is None else "stochastic", "key": key, "full_range": True}
        for got, want in (
            (products.quantize_rows(x, levels, key=key), quantize(x, bits, granularity="row", **options)),
            (
                products.quantize_rows(x, levels, column_scale=factor, key=key),
                quantize(x * factor, bits, granularity="row", **options),
            ),
            (products.quantize_columns(x, levels, key=key), quantize(x, bits, granularity="column", **options)),
            (products.quantize_tensor(x, levels, key=key), quantize(x, bits, **options)),
        ):
            assert torch.equal(got[0], want.codes)
            assert torch.equal(got[1], want.scale.reshape(-1))


@pytest.mark.thorough
def test_compiled(rng):
    x = torch.from_numpy(rng.normal(size=(9, 40))).float()
    compiled = torch.compile(quantize, fullgraph=True)
    for key in (None, fold_key(2)):
        options = {"granularity": "row", "rounding": "nearest" if key is None else "stochastic", "key": key}
        got, want = compiled(x, 8, full_range=True, **options), quantize(x, 8, full_range=True, **options)
        assert torch.equal(got.codes, want.codes)
        assert torch.equal(got.scale, want.scale)


def test_asymmetric_codes_have_no_other_range():
    with pytest.raises(ValueError, match=r"quantize\(full_range\): got True; allowed: with symmetric codes"):
        quantize(torch.ones(3), 8, symmetric=False, full_range=True)
