"""Masters of 24 and 16 bits, against numpy's integers."""

import numpy as np
import pytest
import torch

from ds_quant.numerics.master import join_master, round_weight, split_master
from ds_quant.numerics.random import bits_at, fold_words

EDGES = [0x0, 0x80, 0x7F, 0x81, 0xFF, 0x7FFF, 0x8000, 0x8001, 0x17F80, 0x18000, 0x3F800080, 0x3F808000, 0x3FFFFF80]
EDGES += [0x7F7FFFFF, 0x7F7F8000, 0x7F7F7FFF, 0x7F800000, 0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0x00000001, 0x007FFFFF]


def some(rng, count):
    """Any bit patterns, both signs of the edges first."""
    edges = np.array(EDGES, dtype=np.uint32)
    drawn = rng.integers(0, 2**32, count, dtype=np.uint64).astype(np.uint32)
    return torch.from_numpy(np.concatenate([edges, edges | np.uint32(2**31), drawn]).view(np.float32).copy())


def bits_of(tensor):
    width = {torch.float32: np.int32, torch.bfloat16: np.int16, torch.int8: np.int8}[tensor.dtype]
    view = tensor.view({torch.float32: torch.int32, torch.bfloat16: torch.int16}.get(tensor.dtype, torch.int8))
    return view.numpy().astype(width).astype(np.int64)


def oracle(values, noise):
    """The definition, a number at a time: (weight, remainder) as unsigned 16 and signed 8 bits."""
    found = []
    for value, pattern, more in zip(values.tolist(), bits_of(values) & 0xFFFFFFFF, noise, strict=True):
        u = int(pattern)
        if value != value:
            m = 0x7FC000
        elif value in (float("inf"), -float("inf")):
            m = u >> 8
        else:
            m = (u + int(more)) >> 8
            if m & 0x7FFFFF == 0x7F8000:
                m -= 1
        weight = (m + 128) >> 8
        found.append((weight, m - (weight << 8)))
    return np.array(found)


@pytest.mark.parametrize("stochastic", [False, True])
def test_the_split_is_the_definition(stochastic, rng):
    values = some(rng, 2001)
    key, offset = fold_words(int(rng.integers(2**40))), int(rng.integers(2**40))
    noise = np.full(values.numel(), 128)
    if stochastic:
        noise = (bits_at(key, torch.arange(values.numel()) + offset) >> 24).numpy()
    weight, remainder = split_master(values, key if stochastic else None, offset=offset)
    expected = oracle(values, noise)
    assert weight.dtype == torch.bfloat16
    assert remainder.dtype == torch.int8
    np.testing.assert_array_equal(bits_of(weight) & 0xFFFF, expected[:, 0])
    np.testing.assert_array_equal(bits_of(remainder), expected[:, 1])


def test_a_master_is_within_half_a_step_and_is_split_into_the_same(rng):
    values = some(rng, 100_001)
    weight, remainder = split_master(values)
    master = join_master(weight, remainder)
    finite = torch.isfinite(values)
    # Below 2^-126 a step of 24 bits is 2^8 times fp32's smallest number.
    _, exponent = torch.frexp(values[finite].double())
    step = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent.clamp(min=-125) - 16)
    error = (master[finite].double() - values[finite].double()).abs()
    assert (error <= step / 2)[values[finite].abs() < 3.4e38].all()
    assert (error <= step).all()
    assert torch.isfinite(master[finite]).all()
    assert torch.equal(torch.isnan(master), torch.isnan(values))
    assert torch.equal(torch.isinf(master), torch.isinf(values))
    again = split_master(master)
    np.testing.assert_array_equal(bits_of(again[0]), bits_of(weight))
    np.testing.assert_array_equal(bits_of(again[1]), bits_of(remainder))


def test_the_weight_is_the_nearest_bf16(rng):
    values = torch.from_numpy(rng.standard_normal(100_000).astype(np.float32))
    master = join_master(*split_master(values))
    weight, nearest = split_master(master)[0], master.to(torch.bfloat16)
    # Ties alone may differ, of which one number in 2^8 is one: both neighbours are as near then.
    assert torch.equal((weight.float() - master).abs(), (nearest.float() - master).abs())
    assert (weight != nearest).float().mean() < 0.01


@pytest.mark.parametrize("split", [True, False])
def test_stochastic_rounding_is_right_on_average(split, rng):
    """The mean of n draws of a rounding with steps s is within 5 s / (2 sqrt(n)) of the value: 5 sigma at most."""
    step = 2.0**-15 if split else 2.0**-7
    # Between two numbers, and not so near to one that the other may never be drawn.
    value = 1 + step * float(rng.integers(1 / step) + rng.uniform(0.1, 0.9))
    values = torch.full((100_000,), value)
    key = fold_words(int(rng.integers(2**40)))
    drawn = join_master(*split_master(values, key)) if split else round_weight(values, key)
    assert drawn.unique().numel() == 2
    error = drawn.double().mean().item() - values[0].item()
    assert abs(error) < 5 * step / 2 / 100_000**0.5


def test_weights_without_masters(rng):
    values = some(rng, 2001)
    nearest, finite = round_weight(values), ~values.isnan()
    assert torch.equal(nearest[finite].view(torch.int16), values.to(torch.bfloat16)[finite].view(torch.int16))
    assert nearest[~finite].isnan().all()
    drawn = round_weight(values, (3, 5))
    assert torch.equal(torch.isnan(drawn), torch.isnan(values))
    assert torch.equal(torch.isinf(drawn) & torch.isinf(values), torch.isinf(values))
    exact = values[~values.isnan()].to(torch.bfloat16)
    assert torch.equal(round_weight(exact.float(), (3, 5)), exact)
    part = round_weight(values[1000:], (3, 5), offset=1000)
    assert torch.equal(part.view(torch.int16), drawn[1000:].view(torch.int16))
