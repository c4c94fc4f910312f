"""Quantization in blocks against its oracle, bit for bit, and what holds for any input."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numerics import moment_oracle
from numerics.block_inputs import BLOCK_SIZE, KINDS, assert_equal, denormal, huge, make_input, normal, spread, wild

from ds_quant.numerics import code_map, code_values, dequantize_blockwise, fold_key, group_size, quantize_blockwise
from ds_quant.numerics.codes import BITS, MAPS
from ds_quant.numerics.packing import pack, unpack

ALL = [case for case in itertools.product(MAPS, BITS, (True, False)) if case[:2] != ("float", 4)]
LENGTHS = (0, 1, 2, 31, 32, 33, 63, 65, 97, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_against_oracle(x, name, bits, signed, key, offset=0):
    key_ints = None if key is None else tuple(key.tolist())
    codes, scale, values = moment_oracle.quantize(x.float().numpy(), name, bits, signed, BLOCK_SIZE, key_ints, offset)
    m = code_map(name, bits, signed=signed)
    rounding = "nearest" if key is None else "stochastic"
    for view in (x, torch.stack((x, x + 1), dim=-1)[:, 0]):
        q = quantize_blockwise(view, m, block_size=BLOCK_SIZE, rounding=rounding, key=key, offset=offset)
        if bits == 4:
            assert q.codes.dtype == torch.uint8
            assert q.codes.tolist() == moment_oracle.pack(codes, BLOCK_SIZE)
        else:
            assert q.codes.dtype == m.dtype
            assert q.codes.tolist() == codes
        assert_equal(q.scale, torch.from_numpy(scale))
        assert (q.numel, q.block_size, q.code_map) == (len(x), BLOCK_SIZE, m)
        assert_equal(dequantize_blockwise(q), torch.from_numpy(values))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(("name", "bits", "signed"), ALL)
def test_codes_scales_and_values_equal_the_oracle(name, bits, signed, rounding, rng):
    kinds = itertools.cycle(KINDS[i] for i in rng.permutation(len(KINDS)))
    for length, dtype in zip(LENGTHS, itertools.cycle(DTYPES), strict=False):
        kind = next(kinds)
        print(length, dtype, kind.__name__)
        key = fold_key(int(rng.integers(2**63))) if rounding == "stochastic" else None
        offset = int(rng.choice([0, 32, 2**32 - 32, 2**40])) if key is not None else 0
        check_against_oracle(make_input(rng, kind, length, signed, dtype), name, bits, signed, key, offset)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "bits", "signed"), ALL)
def test_every_kind_of_input_equals_the_oracle(name, bits, signed, kind, rng):
    check_against_oracle(make_input(rng, kind, 40, signed), name, bits, signed, None)


@given(
    array=hnp.arrays(np.float32, st.integers(0, 50), elements=st.floats(width=32)),
    case=st.sampled_from(ALL),
    seed=st.none() | st.integers(0, 2**64 - 1),
)
def test_any_input_equals_the_oracle(array, case, seed):
    check_against_oracle(torch.from_numpy(array), *case, None if seed is None else fold_key(seed))


@pytest.mark.parametrize(("name", "bits", "signed"), ALL)
def test_every_code_round_trips(name, bits, signed):
    m = code_map(name, bits, signed=signed)
    values = code_values(m)
    for scale in (1.0, 3e-8, 1e30, 2.0**-100):
        for key in (None, fold_key(5)):
            x = torch.cat((values, values.flip(0))) * scale
            rounding = "nearest" if key is None else "stochastic"
            q = quantize_blockwise(x, m, block_size=1024, rounding=rounding, key=key)
            # Products and quotients by scales that are no powers of two are rounded.
            assert torch.allclose(dequantize_blockwise(q), x, rtol=3e-7 if math.log2(scale) % 1 or key is None else 0)
            again = quantize_blockwise(dequantize_blockwise(q), m, block_size=1024)
            assert torch.equal(again.codes, q.codes)


@pytest.mark.parametrize(("name", "bits", "signed"), ALL)
def test_a_block_of_zeros_comes_back_as_zeros(name, bits, signed):
    m = code_map(name, bits, signed=signed)
    for key in (None, fold_key(0)):
        x = torch.cat((torch.zeros(16), -torch.zeros(16), torch.ones(32), torch.zeros(5)))
        q = quantize_blockwise(x, m, block_size=32, rounding="nearest" if key is None else "stochastic", key=key)
        values = dequantize_blockwise(q)
        assert q.scale.tolist() == [0, 1, 0]
        assert values.tolist() == x.tolist()
        assert not torch.signbit(values).any()
        fresh = q._replace(codes=torch.zeros_like(q.codes), scale=torch.zeros_like(q.scale))
        assert (dequantize_blockwise(fresh) == 0).all()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(("name", "bits", "signed"), ALL)
def test_a_non_finite_value_is_seen_in_its_block_and_in_no_other(name, bits, signed, value):
    m = code_map(name, bits, signed=signed)
    x = torch.linspace(0.1, 4, 75)
    clean = dequantize_blockwise(quantize_blockwise(x, m, block_size=32))
    x[40] = value
    q = quantize_blockwise(x, m, block_size=32)
    values = dequantize_blockwise(q)
    assert q.scale.isnan().tolist() == [False, True, False]
    assert values.isnan().tolist() == [32 <= i < 64 for i in range(75)]
    assert torch.equal(values[~values.isnan()], clean[~values.isnan()])


@pytest.mark.parametrize(("name", "bits", "signed"), ALL)
def test_values_never_exceed_the_scale(name, bits, signed, rng):
    m = code_map(name, bits, signed=signed)
    for kind in (wild, huge, denormal):
        x = make_input(rng, kind, 200, signed)
        q = quantize_blockwise(x, m, block_size=32, rounding="stochastic", key=fold_key(1))
        values = dequantize_blockwise(q)
        assert values.isfinite().all()
        assert (values.abs() <= q.scale.repeat_interleave(32)[:200]).all()


def test_flushed_denormals_become_zero_and_nothing_worse():
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        for (name, bits, signed), length in itertools.product(ALL, (32, 40)):
            x = torch.full((length,), 1e-40)
            m = code_map(name, bits, signed=signed)
            for key in (None, fold_key(0)):
                rounding = "nearest" if key is None else "stochastic"
                values = dequantize_blockwise(quantize_blockwise(x, m, block_size=32, rounding=rounding, key=key))
                assert (values == 0).all()
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("block_size", [1, 2, 5, 7, 32, 64])
def test_packing_is_planar_within_the_block(block_size, rng):
    for length in (0, 1, block_size, 3 * block_size, 3 * block_size + 1, 4 * block_size - 1):
        codes = torch.from_numpy(rng.integers(-8, 8, length)).to(torch.int8)
        packed = pack(codes, block_size)
        assert packed.tolist() == moment_oracle.pack(codes.tolist(), block_size)
        assert torch.equal(unpack(packed, length, block_size, signed=True), codes)
        assert torch.equal(unpack(packed, length, block_size, signed=False), (codes & 15).to(torch.uint8))
        if block_size % 2 == 0:
            assert packed.numel() == (length + 1) // 2


def test_the_bytes_of_a_block_by_hand():
    x = torch.tensor([7.0, -7.0, 1.0, 0.0, -7.0, 7.0, 7.0])
    q = quantize_blockwise(x, code_map("linear", 4, signed=True), block_size=4)
    # 7 with 1, -7 with 0; then -7 with 7, and 7 alone.
    assert q.codes.tolist() == [0x17, 0x09, 0x79, 0x07]
    assert dequantize_blockwise(q).tolist() == x.tolist()


@pytest.mark.parametrize("bits", BITS)
def test_a_partition_draws_what_the_whole_would(bits, rng):
    m = code_map("power", bits, signed=False)
    x = make_input(rng, spread, 500, False)
    options = {"block_size": 32, "rounding": "stochastic", "key": fold_key(7)}
    whole = quantize_blockwise(x, m, **options)
    parts = [
        quantize_blockwise(x[a:b], m, offset=a, **options) for a, b in itertools.pairwise((0, 64, 96, 96, 416, 500))
    ]
    assert torch.equal(torch.cat([part.codes for part in parts]), whole.codes)
    assert torch.equal(torch.cat([part.scale for part in parts]), whole.scale)
    assert not torch.equal(quantize_blockwise(x, m, offset=32, **options).codes, whole.codes)


@pytest.mark.parametrize(("name", "bits", "signed"), ALL)
def test_stochastic_rounding_is_unbiased_in_value(name, bits, signed, rng):
    m = code_map(name, bits, signed=signed)
    table = code_values(m).double().unique()  # sorted
    # Within the map: what lies outside is brought to its end.
    x = torch.from_numpy(rng.uniform(table[0], 1, 100) * 3e-5).float()
    x[0] = 3e-5
    num_keys, num_blocks = 15, 100
    blocks = torch.nn.functional.pad(x, (0, 28)).repeat(num_blocks)  # each element has bits of its own
    options = {"block_size": 128, "rounding": "stochastic"}
    drawn = [
        dequantize_blockwise(quantize_blockwise(blocks, m, key=fold_key(1, step), **options))
        for step in range(num_keys)
    ]
    num_draws = num_keys * num_blocks
    mean = torch.cat(drawn).reshape(num_draws, 128).double().mean(0)
    steps = x[1:].double() / x[0].double()
    above = torch.searchsorted(table, steps).clamp(1, len(table) - 1)
    low, gap = table[above - 1], table[above] - table[above - 1]
    p = ((steps - low) / gap).clamp(0, 1)
    error = (mean[1:100] / x[0].double() - steps) / gap
    # 5 deviations, and an event more or less where they are few.
    assert (error.abs() <= 5 * (p * (1 - p) / num_draws).sqrt() + 4 / num_draws).all()
    assert error.mean().abs() <= 5 * (p * (1 - p) / num_draws).mean().sqrt() / 99**0.5


def test_the_update_of_a_moving_average_below_half_a_step_is_kept_only_by_stochastic_rounding():
    """v falls by 0.1% a step. Nearest rounding leaves it where it is, for ever."""
    m = code_map("power", 8, signed=False)
    target = torch.full((256,), 0.01)
    target[0] = 1.0
    num_steps = 2000
    for rounding in ("nearest", "stochastic"):
        v = quantize_blockwise(target.sqrt(), m, block_size=256)
        for step in range(num_steps):
            exact = dequantize_blockwise(v) * 0.999 + 0.001 * target
            key = fold_key(1, step) if rounding == "stochastic" else None
            v = quantize_blockwise(exact, m, block_size=256, rounding=rounding, key=key)
        ratio = (dequantize_blockwise(v) / target)[1:].mean()
        expected = 1 + 9 * 0.999**num_steps  # 2.2
        assert ratio > 9 if rounding == "nearest" else abs(ratio / expected - 1) < 0.1


def test_input_is_left_alone_and_no_gradient_flows():
    x = torch.randn(70, requires_grad=True)
    before = x.detach().clone()
    q = quantize_blockwise(x, code_map("power", 4, signed=True), block_size=32)
    assert not q.scale.requires_grad
    assert torch.equal(x, before)


def test_granularities_of_whole_parameters(rng):
    assert group_size((6, 35), "block", 64) == 64
    assert group_size((6, 35), "tensor", 64) == 210
    assert group_size((6, 35), "channel", 64) == 35
    assert group_size((6, 5, 7), "channel", 64) == 35
    assert group_size((35,), "channel", 64) == 35
    for shape, granularity in itertools.product(((), (0,), (0, 4), (4, 0)), ("tensor", "channel")):
        assert group_size(shape, granularity, 64) == 1
        x = torch.ones(shape).reshape(-1)
        q = quantize_blockwise(x, code_map("linear", 4, signed=True), block_size=1)
        assert torch.equal(dequantize_blockwise(q), x)
    x = make_input(rng, normal, 210, True).reshape(6, 35)
    for bits in BITS:
        m = code_map("linear", bits, signed=True)
        levels = 127 if bits == 8 else 7
        for granularity, absmax in (("tensor", x.abs().max()), ("channel", x.abs().amax(dim=1))):
            q = quantize_blockwise(x.reshape(-1), m, block_size=group_size(x.shape, granularity, 256))
            assert torch.equal(q.scale, absmax.reshape(-1))
            error = (dequantize_blockwise(q).reshape(6, 35) - x).abs().amax(dim=1)
            assert (error <= absmax / levels * 0.50001).all()
    with pytest.raises(ValueError, match=r"\(granularity\): got 'row'; allowed: block, tensor, channel; "):
        group_size((2, 2), "row", 64)
