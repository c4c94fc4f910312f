"""MS-EDEN against its definition, and what it is for: no bias after a rotation with random signs, at a lower error."""

import numpy as np
import pytest
import torch
from numerics import eden_oracle
from numerics.test_rotation_of_rows import dense

from ds_quant.linear.recipe import Quantizer
from ds_quant.linear.rotated import Rotation, quantize_rotated
from ds_quant.numerics.integer import dequantize
from ds_quant.numerics.random import fold_key

HOWS = [
    {"bits": 4, "block_size": 16},
    {"bits": 2, "block_size": 64},
    {"format": "fp4_e2m1", "block_size": 32},
    {"format": "nvfp4"},
    {"format": "nvint4"},
]
ROUNDINGS = 26 * 2.0**-24
"""Of a factor: a division, a square or product and log2(64) additions in each of two sums, of terms that are not
negative, in one of which x / scale counts twice; the division of the two; the scale of the block and its product."""


def quantizer(how, rounding="ms_eden"):
    name = how.get("format", "")
    return Quantizer(how.get("bits", 4), "block", True, rounding, how.get("block_size", 16), format_name=name)


def quantized(x, how, key, rounding="ms_eden", block=64):
    """x as the signs of the rotation leave it."""
    return quantize_rotated(x, quantizer(how, rounding), key, 0, Rotation(block, None))


def rotated(x, block=64):
    return Rotation(block, None).of_rows(x)


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_scales(how):
    """The factor of each block; in e4m3 one of the two values beside it, with the mean of many draws.

    A mean of N draws of two values a gap h apart is off by more than sqrt(2 L v / N) + 2 L h / (3 N), v their variance,
    with a probability of less than 2 exp(-L) (Bernstein): for L = 25 and a thousand blocks 3e-8.
    """
    x = torch.randn(5, 200) * torch.exp(3 * torch.randn(5, 1))
    x[1, 64:128] = 0
    steps, scale, factor, tensor, size = eden_oracle.blocks(rotated(x), how)
    want = scale * factor
    assert np.abs(factor - 1).max() > 2.0**-10, "nothing to correct"
    if "format" not in how or how["format"].startswith("fp4"):
        q = quantized(x, how, fold_key(0))
        assert (np.abs(q.scale.double().numpy() - want) <= ROUNDINGS * want).all()
        values = dequantize(q).double().numpy()
        expanded = q.scale.double().numpy().repeat(size, 1)[:, :200]
        assert np.allclose(values, steps * expanded, rtol=2.0**-23, atol=0)
        return
    draws, total = 150, np.zeros_like(want)
    low, high = np.vectorize(eden_oracle.neighbours)(want / tensor)
    near = 2 * ROUNDINGS * want
    for seed in range(draws):
        found = quantized(x, how, fold_key(seed)).scale.double().numpy()
        assert ((np.abs(found - low * tensor) <= near) | (np.abs(found - high * tensor) <= near)).all()
        total += found
    gap, share = (high - low) * tensor, (want / tensor - low) / np.where(high > low, high - low, 1)
    bound = np.sqrt(2 * 25 * gap**2 * share * (1 - share) / draws) + 2 * 25 * gap / (3 * draws)
    assert (np.abs(total / draws - want) <= bound + near).all()


@pytest.mark.parametrize("how", HOWS[:3], ids=str)
def test_the_part_along_the_vector_is_exact(how):
    """<y, estimate> = <y, y> in each block and draw; rounded to nearest it is off by hundreds of times the bound."""
    x = torch.randn(64, 128)
    y = rotated(x).double()
    squares = y.square().sum(1)
    along = (dequantize(quantized(x, how, fold_key(1))).double() * y).sum(1)
    assert ((along - squares).abs() <= 2 * ROUNDINGS * squares).all()
    nearest = (dequantize(quantized(x, how, None, "nearest")).double() * y).sum(1)
    assert ((nearest - squares).abs() > 200 * ROUNDINGS * squares).any()


def test_unbiased_after_random_signs():
    """The mean of N estimates is as far from the vector as N independent ones without bias have it: E |error|^2 / N.

    Over 128 elements that ratio spreads by sqrt(2 / 128) = 0.125: at most 2 is 8 of these. To nearest a shrinkage of
    half a percent alone adds N * 0.005^2 / 0.095^2 = 2.8 for N = 1024.
    """
    x, count = torch.randn(1, 128), 1024
    signs = torch.randint(0, 2, (count, 128)).float() * 2 - 1
    ratios, errors = {}, {}
    for rounding in ("ms_eden", "nearest", "stochastic"):
        q = quantized(x * signs, {"format": "nvfp4"}, fold_key(7), rounding, block=128)
        estimates = (dequantize(q).double() @ dense(128, 128).t()) * signs
        errors[rounding] = float((estimates - x).square().sum(1).mean())
        ratios[rounding] = float((estimates.mean(0) - x[0]).square().sum()) / (errors[rounding] / count)
    assert ratios["ms_eden"] < 2 < ratios["nearest"]
    # Half of it in the paper and here; each is a mean over 8192 blocks.
    assert errors["ms_eden"] < 0.6 * errors["stochastic"]


def test_edges():
    """Zeros stay zeros; a NaN or Inf makes its block NaN, or in e4m3 no other one; the smallest blocks vanish."""
    for how in HOWS:
        size = how.get("block_size", 16)
        assert dequantize(quantized(torch.zeros(3, 40), how, fold_key(0))).eq(0).all()
        assert quantized(torch.zeros(0, 40), how, fold_key(0)).codes.shape == (0, 40)
        x = torch.randn(2, 192)
        x[0, 70] = torch.inf  # of the second of three blocks of the rotation
        values = dequantize(quantized(x, how, fold_key(0)))
        assert values[0, 64:128].isnan().all()
        assert values[0, :64].isfinite().all(), size
        assert values[1].isfinite().all()
    tiny = torch.cat((torch.randn(1, 64), torch.randn(1, 64) * 2.0**-30), 1)
    assert dequantize(quantized(tiny, {"format": "nvfp4"}, fold_key(0)))[0, 64:].eq(0).all()
