"""Integer quantization against its oracle, bit for bit, and what holds for any input."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numerics import oracle
from numerics.integer_inputs import (
    BITS,
    BLOCK_SIZE,
    DTYPES,
    FLOAT32_MAX,
    GRANULARITIES,
    KINDS,
    ROUNDINGS,
    SYMMETRIC,
    assert_close,
    assert_equal,
    make_input,
    normal,
)

from ds_quant.numerics import dequantize, expand_scale, fake_quantize, fold_key, integer_values, quantize

SHAPES = ((), (0,), (3, 0), (0, 5), (1,), (16,), (7, 13), (2, 3, 17), (2, 0, 4), (5, 130), (3, 64))


def layouts(x):
    """The same tensor with other strides."""
    yield x
    if x.dim() >= 2:
        yield x.transpose(0, -1).contiguous().transpose(0, -1)
        yield torch.stack((x, x + 1), dim=-1)[..., 0]


def check_against_oracle(x, bits, granularity, symmetric, key):
    rounding = "nearest" if key is None else "stochastic"
    options = {"granularity": granularity, "block_size": BLOCK_SIZE}
    key_ints = None if key is None else tuple(key.tolist())
    codes, scale, zero_point = oracle.quantize(
        x.float().contiguous().numpy(), bits, symmetric=symmetric, key=key_ints, **options
    )
    values = torch.from_numpy(np.asarray(oracle.dequantize(codes, scale, zero_point, **options)))
    for view in layouts(x):
        q = quantize(view, bits, symmetric=symmetric, rounding=rounding, key=key, **options)
        assert_equal(q.codes, torch.from_numpy(codes).to(torch.int8 if symmetric else torch.uint8))
        assert_equal(q.scale, torch.from_numpy(scale))
        assert (q.zero_point is None) == symmetric
        if not symmetric:
            assert_equal(q.zero_point, torch.from_numpy(zero_point))
        assert (q.granularity, q.block_size) == (granularity, BLOCK_SIZE)
    # The oracle does not bring back what rounding carried past the largest number.
    finite = q.scale.isfinite().all()
    expected = values.clamp(-FLOAT32_MAX, FLOAT32_MAX) if finite else values
    assert_equal(dequantize(q), expected)
    fake = fake_quantize(view, bits, symmetric=symmetric, rounding=rounding, key=key, **options)
    limit = torch.finfo(x.dtype).max
    assert_equal(fake, (values.clamp(-limit, limit) if finite else values).to(x.dtype))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("symmetric", SYMMETRIC)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", BITS)
def test_codes_and_scales_equal_the_oracle(bits, granularity, symmetric, rounding, rng):
    kinds = itertools.cycle(KINDS[i] for i in rng.permutation(len(KINDS)))
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        key = fold_key(int(rng.integers(2**63))) if rounding == "stochastic" else None
        kind = next(kinds)
        print(shape, dtype, kind.__name__)
        check_against_oracle(make_input(rng, kind, shape, dtype), bits, granularity, symmetric, key)


@pytest.mark.parametrize("symmetric", SYMMETRIC)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_input_equals_the_oracle(kind, granularity, symmetric, rng):
    for dtype, bits in itertools.product(DTYPES, (2, 4, 8)):
        check_against_oracle(make_input(rng, kind, (3, 35), dtype), bits, granularity, symmetric, None)


arrays = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=1, max_dims=3, max_side=20), elements=st.floats(width=32, allow_nan=True)
)
properties = given(
    array=arrays,
    bits=st.sampled_from(BITS),
    granularity=st.sampled_from(GRANULARITIES),
    symmetric=st.booleans(),
    rounding=st.sampled_from(ROUNDINGS),
    seed=st.integers(0, 2**64 - 1),
)


@properties
def test_any_input_equals_the_oracle(array, bits, granularity, symmetric, rounding, seed):
    key = fold_key(seed) if rounding == "stochastic" else None
    check_against_oracle(torch.from_numpy(array), bits, granularity, symmetric, key)


@properties
def test_finite_stays_finite_and_close_and_non_finite_groups_become_nan(
    array, bits, granularity, symmetric, rounding, seed
):
    x = torch.from_numpy(array)
    options = {"granularity": granularity, "block_size": BLOCK_SIZE, "symmetric": symmetric, "rounding": rounding}
    options["key"] = fold_key(seed) if rounding == "stochastic" else None
    finite = x.nan_to_num(nan=1.0)
    q = quantize(finite, bits, **options)
    low, high = (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    assert low <= q.codes.min()
    assert q.codes.max() <= high
    assert dequantize(q).isfinite().all()
    assert fake_quantize(finite, bits, **options).isfinite().all()
    assert_close(finite, q, rounding)

    broken = quantize(x, bits, **options)
    hurt = expand_scale(broken).isnan().expand(x.shape)
    assert hurt[~x.isfinite()].all()
    assert dequantize(broken)[hurt].isnan().all()
    assert (broken.codes[hurt] == 0).all()
    assert torch.equal(dequantize(broken)[~hurt], dequantize(quantize(finite, bits, **options))[~hurt])


@pytest.mark.parametrize(("granularity", "hurt"), [("tensor", 40), ("row", 20), ("column", 2), ("block", 16)])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("symmetric", SYMMETRIC)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_non_finite_value_is_seen_in_its_group_and_in_no_other(granularity, hurt, value, symmetric, rounding):
    x = torch.linspace(-3, 4, 40).reshape(2, 20)
    options = {"granularity": granularity, "block_size": 16, "symmetric": symmetric, "rounding": rounding}
    options["key"] = fold_key(1) if rounding == "stochastic" else None
    clean = quantize(x, 8, **options)
    x[1, 5] = value
    q = quantize(x, 8, **options)
    lost = dequantize(q).isnan()
    assert lost[1, 5]
    assert lost.sum() == hurt
    assert torch.equal(dequantize(q)[~lost], dequantize(clean)[~lost])
    assert (q.codes[lost] == 0).all()
    assert fake_quantize(x.half(), 8, **options).isnan().sum() == hurt


@pytest.mark.parametrize(
    ("shape", "granularity", "scale_shape"),
    [
        ((2, 3, 40), "tensor", ()),
        ((2, 3, 40), "row", (2, 3, 1)),
        ((2, 3, 40), "column", (40,)),
        ((2, 3, 40), "block", (2, 3, 3)),
        ((2, 3, 32), "block", (2, 3, 2)),
        ((40,), "row", (1,)),
        ((40,), "column", (40,)),
        ((40,), "block", (3,)),
        ((3, 0), "row", (3, 1)),
        ((3, 0), "block", (3, 0)),
        ((0, 5), "column", (5,)),
        ((), "row", ()),
        ((), "column", ()),
        ((), "block", (1,)),
    ],
)
def test_shapes(shape, granularity, scale_shape):
    for symmetric in SYMMETRIC:
        q = quantize(torch.ones(shape), 8, granularity=granularity, block_size=16, symmetric=symmetric)
        assert q.scale.shape == scale_shape
        assert q.zero_point is None or q.zero_point.shape == scale_shape
        assert q.codes.shape == integer_values(q).shape == dequantize(q).shape == shape
        assert torch.broadcast_shapes(expand_scale(q).shape, shape) == shape


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("symmetric", SYMMETRIC)
def test_dequantize_is_integer_values_times_scale_rounded_once(granularity, symmetric, rng):
    x = make_input(rng, normal, (6, 50), torch.float32)
    q = quantize(x, 5, granularity=granularity, block_size=16, symmetric=symmetric)
    values = integer_values(q)
    assert values.dtype == torch.float32
    assert torch.equal(values, values.round())
    assert values.unique().numel() > 4
    for dtype in DTYPES:
        assert torch.equal(dequantize(q, dtype), (values * expand_scale(q)).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_float32_arithmetic_whatever_the_dtype(dtype, rng):
    x = make_input(rng, normal, (9, 33), dtype)
    q, expected = quantize(x, 8, granularity="row"), quantize(x.float(), 8, granularity="row")
    assert q.scale.dtype == torch.float32
    assert torch.equal(q.scale, expected.scale)
    assert torch.equal(q.codes, expected.codes)


def test_symmetric_codes_leave_out_the_lowest():
    x = torch.tensor([-127.0, -126.5, -0.5, 0.5, 1.5, 2.5, 127.0])
    assert quantize(x, 8).codes.tolist() == [-127, -126, 0, 0, 2, 2, 127]
    assert quantize(torch.tensor([-7.0, 3.5, 7.0]), 4).codes.tolist() == [-7, 4, 7]
    assert quantize(torch.tensor([-1.0, 0.2, 1.0]), 2).codes.tolist() == [-1, 0, 1]


def test_asymmetric_codes_use_every_level():
    for bits in BITS:
        x = torch.arange(2.0**bits) + 1000
        q = quantize(x, bits, symmetric=False)
        assert q.codes.tolist() == list(range(2**bits))
        assert q.zero_point == -1000
        assert torch.equal(dequantize(q), x)


def test_input_is_left_alone_and_no_gradient_flows():
    x = torch.randn(4, 20, requires_grad=True)
    before = x.detach().clone()
    q = quantize(x, 8, granularity="row", symmetric=False)
    assert not any(t.requires_grad for t in (q.codes, q.scale, q.zero_point, dequantize(q), fake_quantize(x, 8)))
    assert torch.equal(x.detach(), before)
