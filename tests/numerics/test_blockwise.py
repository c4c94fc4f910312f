import itertools
import math

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numerics import moment_oracle

from ds_quant.numerics import (
    CodeMap,
    code_map,
    code_values,
    dequantize_blockwise,
    fold_key,
    from_bitsandbytes,
    group_size,
    quantize_blockwise,
    random_bits,
    to_bitsandbytes,
)
from ds_quant.numerics.codes import BITS, MAPS
from ds_quant.numerics.packing import pack, unpack

ALL = [case for case in itertools.product(MAPS, BITS, (True, False)) if case[:2] != ("float", 4)]
LENGTHS = (0, 1, 2, 31, 32, 33, 63, 65, 97, 128)
BLOCK_SIZE = 32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
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


COMPILED = {
    "whole blocks, nearest": (256, "nearest", [("power", 8, True), ("float", 8, True), ("power", 4, False)]),
    "a tail block, stochastic": (
        301,
        "stochastic",
        [
            ("float", 8, True),
            ("float", 8, False),
            ("power", 4, True),
            ("power", 4, False),
            ("dynamic", 8, True),
            ("dynamic", 4, False),
        ],
    ),
}


@pytest.mark.parametrize("case", COMPILED)
def test_compiled_bits_equal_eager_ones(case, rng):
    length, rounding, cases = COMPILED[case]
    maps = [code_map(name, bits, signed=signed) for name, bits, signed in cases]

    def call(x, key):
        key = key if rounding == "stochastic" else None
        blocks = [
            quantize_blockwise(x if m.signed else x.abs(), m, block_size=32, rounding=rounding, key=key) for m in maps
        ]
        return tuple(t for q in blocks for t in (q.codes, q.scale, dequantize_blockwise(q)))

    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(call, fullgraph=True, dynamic=False, backend=counter)
    for step, kind in enumerate(KINDS):
        x = make_input(rng, kind, length, True)
        key = fold_key(int(rng.integers(2**63)), step)
        for got, expected in zip(compiled(x, key), call(x, key), strict=True):
            assert_equal(got, expected)
    assert counter.frame_count == 1


def bitsandbytes_optimizer(rng, shape):
    import bitsandbytes

    parameter = torch.nn.Parameter(torch.from_numpy(rng.normal(size=shape)).float())
    optimizer = bitsandbytes.optim.AdamW8bit([parameter], lr=1e-3)
    for _ in range(3):
        parameter.grad = torch.from_numpy(rng.normal(size=shape) * 1e-3).float()
        optimizer.step()
    return parameter, optimizer


@pytest.mark.parametrize("shape", [(64, 64), (5003,)])
def test_a_bitsandbytes_state_moves_here_and_back(shape, rng):
    from bitsandbytes.functional import dequantize_blockwise as reference

    parameter, optimizer = bitsandbytes_optimizer(rng, shape)
    state = optimizer.state[parameter]
    moments = from_bitsandbytes(state)
    for number, moment in enumerate(moments, start=1):
        expected = reference(
            state[f"state{number}"], absmax=state[f"absmax{number}"], code=state[f"qmap{number}"], blocksize=256
        )
        assert expected.abs().max() > 0
        assert torch.allclose(dequantize_blockwise(moment), expected.reshape(-1), rtol=1e-6, atol=0)
    back = to_bitsandbytes(*moments, parameter.shape)
    for name, tensor in back.items():
        assert tensor.dtype == state[name].dtype
        assert tensor.shape == state[name].shape
        assert torch.allclose(tensor.float(), state[name].float(), rtol=3e-7, atol=0)


def test_bitsandbytes_goes_on_from_our_moments(rng):
    parameter, optimizer = bitsandbytes_optimizer(rng, (4096,))
    twin, other = bitsandbytes_optimizer(rng, (4096,))
    twin.data.copy_(parameter.data)
    state = optimizer.state[parameter]
    ours = [moment._replace(codes=moment.codes.clone()) for moment in from_bitsandbytes(state)]
    other.state[twin].update({name: tensor.clone() for name, tensor in to_bitsandbytes(*ours, twin.shape).items()})
    grad = torch.from_numpy(rng.normal(size=4096) * 1e-3).float()
    for p, o in ((parameter, optimizer), (twin, other)):
        p.grad = grad.clone()
        o.step()
    assert torch.allclose(parameter, twin, rtol=0, atol=1e-6)


def test_our_quantizer_is_close_to_that_of_bitsandbytes(rng):
    import bitsandbytes.functional as bnb

    for signed in (True, False):
        x = make_input(rng, spread, 8192, signed)
        m = code_map("dynamic", 8, signed=signed)
        ours = quantize_blockwise(x, m, block_size=256)
        theirs, state = bnb.quantize_blockwise(x, code=bnb.create_dynamic_map(signed), blocksize=256)
        assert torch.equal(ours.scale, state.absmax)
        # bitsandbytes on a CPU does not always take the nearest code.
        assert (ours.codes == theirs).float().mean() > 0.4
        difference = dequantize_blockwise(ours) - dequantize_blockwise(ours._replace(codes=theirs))
        assert difference.norm() < 0.02 * x.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state1": torch.zeros(4096)}, r"\(state1\): got torch.float32; allowed: torch.uint8; "),
        ({"qmap2": torch.linspace(0, 1, 256)}, r"\(qmap2\): got another map"),
        ({"qmap1": torch.zeros(16)}, r"\(qmap1\): got another map"),
        ({"absmax2": torch.zeros(17)}, r"\(absmax2\): got shape \(17,\); allowed: \(16,\) "),
    ],
)
def test_a_state_of_another_layout_is_refused(change, message, rng):
    parameter, optimizer = bitsandbytes_optimizer(rng, (4096,))
    with pytest.raises(ValueError, match=message):
        from_bitsandbytes({**optimizer.state[parameter], **change})


def test_only_blocks_of_256_with_the_dynamic_map_go_to_bitsandbytes():
    x = torch.rand(512)
    m, v = (quantize_blockwise(x, code_map("dynamic", 8, signed=signed), block_size=256) for signed in (True, False))
    power = quantize_blockwise(x, code_map("power", 8, signed=False), block_size=256)
    short = quantize_blockwise(x, code_map("dynamic", 8, signed=True), block_size=128)
    with pytest.raises(ValueError, match=r"\(exp_avg_sq\): got CodeMap\(name='power'"):
        to_bitsandbytes(m, power, (512,))
    with pytest.raises(ValueError, match=r"\(exp_avg\): got .* in blocks of 128; allowed: .* in blocks of 256; "):
        to_bitsandbytes(short, v, (512,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.ones(3, dtype=torch.float64)}, r"\(x\): got torch.float64; allowed: float32, bfloat16, float16; "),
        ({"x": torch.ones(3, 3)}, r"\(x\): got 2 dimensions; allowed: 1; "),
        ({"block_size": 48}, r"\(block_size\): got 48 for 100 elements; allowed: powers of two, and divisors "),
        ({"block_size": 0}, r"\(block_size\): got 0 "),
        ({"block_size": -2}, r"\(block_size\): got -2 "),
        ({"block_size": 64.0}, r"\(block_size\): got 64.0 "),
        ({"block_size": True}, r"\(block_size\): got True "),
        ({"rounding": "up"}, r"\(rounding\): got 'up'; allowed: nearest, stochastic; "),
        ({"rounding": "stochastic"}, r"\(key\): got None; allowed: a key with rounding 'stochastic'; "),
        ({"key": fold_key(0)}, r"\(key\): got a key; allowed: none with rounding 'nearest'"),
        ({"rounding": "stochastic", "key": torch.ones(2)}, r"\(key\): got torch.float32 of shape \(2,\); allowed: "),
        ({"rounding": "stochastic", "key": random_bits(fold_key(0), 3)}, r"\(key\): got torch.int64 of shape \(3,\); "),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    arguments = {"x": torch.ones(100), "block_size": 32, **arguments}
    with pytest.raises(ValueError, match=message):
        quantize_blockwise(arguments.pop("x"), CodeMap("power", 8, True, 127, 0, 4), **arguments)
