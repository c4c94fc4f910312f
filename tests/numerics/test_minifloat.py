"""Elements in floating point: every code, every tie, what lies beyond, against tables and other implementations."""

import numpy as np
import pytest
import torch
from numerics import format_oracle

from ds_quant.numerics.minifloat import MINIFLOATS, decode, encode, power_of_two

TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
ML_DTYPES = {
    "e4m3": "float8_e4m3fn",
    "e5m2": "float8_e5m2",
    "e2m3": "float6_e2m3fn",
    "e3m2": "float6_e3m2fn",
    "e2m1": "float4_e2m1fn",
}


def all_codes(fmt):
    return torch.arange(1 << fmt.bits, dtype=torch.int32).to(torch.uint8)


def finite_codes(name):
    fmt = MINIFLOATS[name]
    positive = torch.arange(format_oracle.KINDS[name][2], dtype=torch.int32)
    return torch.cat([positive, positive | (1 << (fmt.bits - 1))]).to(torch.uint8)


def awkward_values(name):
    """Every value, every tie, their neighbours in fp32, and magnitudes from denormal to the largest."""
    values = torch.from_numpy(format_oracle.table(name)).float()
    near = torch.cat([values, (values[1:] + values[:-1]) / 2])
    inf = torch.tensor(torch.inf)
    random = torch.rand(20_000) * values[-1] * torch.exp2(-torch.rand(20_000) * 30)
    found = torch.cat([near, near.nextafter(inf), near.nextafter(-inf).clamp(min=0), random, torch.tensor([1e-45])])
    found = found.clamp(max=values[-1])
    return torch.cat([found, -found])


@pytest.mark.parametrize("name", MINIFLOATS)
def test_every_code_and_every_tie(name):
    fmt = MINIFLOATS[name]
    codes = finite_codes(name)
    table = format_oracle.table(name)
    want = torch.from_numpy(np.concatenate([table, -table])).float()
    assert torch.equal(decode(codes, fmt), want)
    assert torch.equal(decode(codes, fmt).signbit(), want.signbit())
    assert torch.equal(encode(want, fmt), codes)
    assert torch.equal(want.bfloat16().float(), want), "not exact in bf16"
    assert torch.equal(want.half().float(), want), "not exact in fp16"
    assert fmt.largest == table[-1]
    x = awkward_values(name)
    number, sign = format_oracle.round_to(x.numpy(), name)
    expected = torch.from_numpy(number + (sign < 0) * (1 << (fmt.bits - 1))).to(torch.uint8)
    assert torch.equal(encode(x, fmt), expected)


@pytest.mark.parametrize("name", MINIFLOATS)
def test_beyond_the_largest_and_no_number(name):
    fmt = MINIFLOATS[name]
    beyond = torch.tensor([fmt.largest * 1.01, 3e38, torch.inf])
    assert torch.equal(decode(encode(torch.cat([beyond, -beyond]), fmt), fmt).abs(), torch.full((6,), fmt.largest))
    of_nan = decode(encode(torch.tensor([torch.nan, -torch.nan]), fmt), fmt)
    assert of_nan.isnan().all() if fmt.nan is not None else (of_nan == 0).all()


@pytest.mark.parametrize("name", TORCH)
def test_as_torch_has_them(name):
    fmt = MINIFLOATS[name]
    values = decode(all_codes(fmt), fmt)
    want = all_codes(fmt).view(TORCH[name]).float()
    torch.testing.assert_close(values, want, rtol=0, atol=0, equal_nan=True)
    x = torch.randint(-(2**31), 2**31, (200_000,)).to(torch.int32).view(torch.float32)
    x = torch.cat([x[x.abs() <= fmt.largest], awkward_values(name)])
    assert torch.equal(encode(x, fmt), x.to(TORCH[name]).view(torch.uint8))


@pytest.mark.parametrize("name", ML_DTYPES)
def test_as_ml_dtypes_has_them(name):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    fmt, dtype = MINIFLOATS[name], getattr(ml_dtypes, ML_DTYPES[name])
    values = all_codes(fmt).numpy().view(dtype).astype(np.float32)
    np.testing.assert_array_equal(decode(all_codes(fmt), fmt).numpy(), values)
    x = awkward_values(name)
    np.testing.assert_array_equal(encode(x, fmt).numpy(), x.numpy().astype(dtype).view(np.uint8))


@pytest.mark.parametrize(
    ("name", "cast"), [("e2m1", "FP4_E2M1_DATA.cast_to_fp4"), ("e2m3", "FP6_E2M3_DATA.cast_to_fp6")]
)
def test_as_compressed_tensors_has_them(name, cast):
    quant_args = pytest.importorskip("compressed_tensors.quantization.quant_args")
    owner, function = cast.split(".")
    x = awkward_values(name)
    want = getattr(getattr(quant_args, owner), function)(x.clone())
    assert torch.equal(decode(encode(x, MINIFLOATS[name]), MINIFLOATS[name]), want)


@pytest.mark.parametrize("name", MINIFLOATS)
def test_stochastic_rounding(name):
    """A value never moves; others go to a neighbour, up with the share of the way that they have gone up."""
    fmt = MINIFLOATS[name]
    values = decode(finite_codes(name), fmt)
    for draw in (0.0, 0.5, 1 - 2.0**-24):
        assert torch.equal(encode(values, fmt, torch.full_like(values, draw)), finite_codes(name))
    x, draws = awkward_values(name), torch.rand(awkward_values(name).shape)
    number, sign = format_oracle.round_to(x.numpy(), name, draws.numpy())
    got = decode(encode(x, fmt, draws), fmt).numpy()
    want = format_oracle.table(name)[number] * sign
    # Shares are fp32 there and fp64 here: a draw within 2^-23 of one may fall to either side.
    assert (got == want).mean() > 1 - 1e-4
    # Draws that are spread evenly give the mean of the neighbours weighted by the way: within one draw's share.
    count, table = 1 << 12, format_oracle.table(name)
    even = (torch.arange(count) + 0.5) / count
    for value in torch.empty(20).uniform_(-fmt.largest, fmt.largest):
        got = decode(encode(value.expand(count), fmt, even), fmt).double()
        above = min(max(np.searchsorted(table, abs(value.item())), 1), len(table) - 1)
        gap = table[above] - table[above - 1]
        assert (got.mean() - value.double()).abs() <= gap / count


def test_powers_of_two():
    exponents = torch.arange(-149, 128, dtype=torch.int32)
    assert torch.equal(power_of_two(exponents).double(), torch.exp2(exponents.double()))
