import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numerics import oracle

from ds_quant.numerics import (
    dequantize,
    expand_scale,
    fake_quantize,
    fold_key,
    integer_values,
    quantize,
    random_bits,
)

BITS = range(2, 9)
GRANULARITIES = ("tensor", "row", "column", "block")
SYMMETRIC = (True, False)
ROUNDINGS = ("nearest", "stochastic")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((), (0,), (3, 0), (0, 5), (1,), (16,), (7, 13), (2, 3, 17), (2, 0, 4), (5, 130), (3, 64))
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


def layouts(x):
    """The same tensor with other strides."""
    yield x
    if x.dim() >= 2:
        yield x.transpose(0, -1).contiguous().transpose(0, -1)
        yield torch.stack((x, x + 1), dim=-1)[..., 0]


def assert_equal(got, expected):
    """Bit for bit, except that a NaN equals a NaN; dtypes and shapes too."""
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    if got.dtype.is_floating_point:
        assert torch.equal(got.isnan(), expected.isnan())
        got, expected = got.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0)
    assert torch.equal(got, expected)


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


def assert_close(x, q, rounding):
    """Within half a scale (a whole one if stochastic) and what float32 itself loses at the group's magnitude."""
    scale = expand_scale(q).double().expand(x.shape)
    group = quantize(x, 8, granularity=q.granularity, block_size=q.block_size)
    absmax = expand_scale(group).double().expand(x.shape) * 127
    # Symmetric: x / scale, scale and the product are each rounded once, 2^-24 of absmax at most. Asymmetric adds the
    # zero point, its sum with the steps and its subtraction. 8 of them bound both.
    bound = scale * (0.5 if rounding == "nearest" else 1) + 8 * 2.0**-24 * absmax + TINY
    error = (dequantize(q).double() - x.double()).abs()
    assert (error <= bound).all()


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


def test_input_is_left_alone_and_no_gradient_flows():
    x = torch.randn(4, 20, requires_grad=True)
    before = x.detach().clone()
    q = quantize(x, 8, granularity="row", symmetric=False)
    assert not any(t.requires_grad for t in (q.codes, q.scale, q.zero_point, dequantize(q), fake_quantize(x, 8)))
    assert torch.equal(x.detach(), before)


COMPILED_CASES = [
    # bits, granularity, symmetric, rounding, dtype, features
    (8, "tensor", True, "nearest", torch.float32, 67),
    (8, "row", True, "stochastic", torch.bfloat16, 67),
    (5, "column", True, "nearest", torch.float16, 67),
    (4, "block", True, "stochastic", torch.float32, 64),
    (4, "block", True, "nearest", torch.bfloat16, 67),
    (2, "tensor", False, "stochastic", torch.bfloat16, 67),
    (8, "row", False, "nearest", torch.float32, 67),
    (3, "column", False, "stochastic", torch.float32, 67),
    (8, "block", False, "stochastic", torch.float16, 67),
]


def assert_compiles_to_the_same(call, inputs, dynamic=None):
    """One compilation serves all inputs, with the bits of eager mode."""
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic)
    compiled(*inputs[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for arguments in inputs:
            for got, expected in zip(compiled(*arguments), call(*arguments), strict=True):
                assert_equal(got, expected)


@pytest.mark.parametrize(("bits", "granularity", "symmetric", "rounding", "dtype", "features"), COMPILED_CASES)
def test_compiled_is_bit_equal_to_eager_without_recompilation(
    bits, granularity, symmetric, rounding, dtype, features, rng
):
    options = {"granularity": granularity, "block_size": BLOCK_SIZE, "symmetric": symmetric, "rounding": rounding}

    def call(x, key):
        q = quantize(x, bits, key=key if rounding == "stochastic" else None, **options)
        return *[t for t in q[:3] if t is not None], dequantize(q, dtype)

    inputs = [
        (make_input(rng, kind, (21, features), dtype), fold_key(int(rng.integers(2**63)), step=number))
        for number, kind in enumerate(KINDS)
    ]
    assert_compiles_to_the_same(call, inputs)


def test_compiled_for_any_number_of_rows(rng):
    def call(x, key):
        return (fake_quantize(x, 8, granularity="row", rounding="stochastic", key=key),)

    inputs = [(make_input(rng, normal, (rows, 40), torch.float32), fold_key(rows)) for rows in (5, 8, 33)]
    assert_compiles_to_the_same(call, inputs, dynamic=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.ones(3, dtype=torch.float64)}, r"\(x\): got torch.float64; allowed: float32, bfloat16, float16; "),
        ({"x": torch.ones(3, dtype=torch.int32)}, r"\(x\): got torch.int32; allowed: "),
        ({"bits": 1}, r"\(bits\): got 1; allowed: integers 2 to 8; "),
        ({"bits": 9}, r"\(bits\): got 9; allowed: "),
        ({"bits": 4.0}, r"\(bits\): got 4.0; allowed: "),
        ({"bits": True}, r"\(bits\): got True; allowed: "),
        ({"granularity": "channel"}, r"\(granularity\): got 'channel'; allowed: tensor, row, column, block; "),
        ({"granularity": "block", "block_size": 8}, r"\(block_size\): got 8; allowed: powers of two from 16 to 4096; "),
        ({"granularity": "block", "block_size": 8192}, r"\(block_size\): got 8192; allowed: "),
        ({"granularity": "block", "block_size": 48}, r"\(block_size\): got 48; allowed: "),
        ({"granularity": "block", "block_size": 64.5}, r"\(block_size\): got 64.5; allowed: "),
        ({"rounding": "up"}, r"\(rounding\): got 'up'; allowed: nearest, stochastic; "),
        (
            {"rounding": "stochastic"},
            r"\(key\): got None; allowed: a key with rounding 'stochastic'; ",
        ),
        ({"key": fold_key(0)}, r"\(key\): got a key; allowed: none with rounding 'nearest'"),
        ({"rounding": "stochastic", "key": torch.ones(2)}, r"\(key\): got torch.float32 of shape \(2,\); allowed: "),
        ({"rounding": "stochastic", "key": random_bits(fold_key(0), 3)}, r"\(key\): got torch.int64 of shape \(3,\); "),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    arguments = {"x": torch.ones(3), "bits": 8, **arguments}
    for function in (quantize, fake_quantize):
        with pytest.raises(ValueError, match=message):
            function(**arguments)


def test_block_size_counts_for_blocks_only():
    assert quantize(torch.ones(3), 8, granularity="row", block_size=7).codes.tolist() == [127, 127, 127]


def test_importing_touches_neither_the_frameworks_nor_an_accelerator():
    program = (
        "import sys, torch, ds_quant.numerics\n"
        "assert not {'deepspeed', 'transformers', 'accelerate'} & set(sys.modules)\n"
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
