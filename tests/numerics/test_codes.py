import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import moment_oracle

from ds_quant.numerics import CodeMap, code_map, code_values, fold_key, uniform16
from ds_quant.numerics.codes import BITS, KINDS, MAPS, decode, encode, register_map

ALL = [case for case in itertools.product(MAPS, BITS, (True, False)) if case[:2] != ("float", 4)]


def oracle_values(name, bits, signed):
    if name == "dynamic":
        return moment_oracle.dynamic(bits, signed)
    if name == "float":
        values = moment_oracle.floats(signed)
        return values + [-value for value in values] if signed else values
    magnitudes = moment_oracle.magnitudes(name, bits, signed)
    return [-value for value in magnitudes[:0:-1]] + magnitudes if signed else magnitudes


def all_codes(code_map):
    return torch.arange(code_map.lowest, code_map.highest + 1)


@pytest.mark.parametrize(("name", "bits", "signed"), ALL)
def test_values_equal_the_oracle(name, bits, signed):
    values = code_values(code_map(name, bits, signed=signed))
    assert values.dtype == torch.float32
    assert values.tolist() == [float(value) for value in oracle_values(name, bits, signed)]
    if (name, signed) == ("float", True):
        assert (values[1:128] > values[:127]).all()
        assert torch.equal(values[128:], -values[:128])
        assert values[127] == 1
    else:
        assert (values[1:] > values[:-1]).all()
        assert values[-1] == 1


@pytest.mark.parametrize(("name", "bits", "signed"), ALL)
def test_every_code_comes_back(name, bits, signed):
    m = code_map(name, bits, signed=signed)
    codes = all_codes(m)
    values = decode(codes.to(m.dtype), m)
    assert encode(values, m).dtype == m.dtype
    assert torch.equal(encode(values, m).long(), codes)
    # Key (0, 0) gives element 0 the least number there is, 0.
    for key in (torch.tensor([0, 0]), fold_key(1), fold_key(2)):
        assert torch.equal(encode(values, m, uniform16(key, values.shape)).long(), codes)
    for draws in (torch.zeros(values.shape), torch.full(values.shape, 1 - 2.0**-16)):
        assert torch.equal(encode(values, m, draws).long(), codes)


@pytest.mark.parametrize(("name", "bits", "signed"), ALL)
def test_the_neighbours_of_values_and_of_middles_equal_the_oracle(name, bits, signed):
    m = code_map(name, bits, signed=signed)
    values = np.unique(code_values(m).numpy())
    middles = (values[1:] + values[:-1]) / np.float32(2)
    points = np.concatenate((values, middles, [0, -0.0, 1e-45, -1e-45, 2, -2])).astype(np.float32)
    x = np.concatenate((points, np.nextafter(points, np.float32(9)), np.nextafter(points, np.float32(-9))))
    # The least and the greatest draw betray a wrong pair of neighbours.
    for draws in (None, uniform16(fold_key(3), x.shape), torch.zeros(x.shape), torch.full(x.shape, 1 - 2.0**-16)):
        codes, _ = moment_oracle.encode(x, name, bits, signed, None if draws is None else draws.numpy())
        assert encode(torch.from_numpy(x), m, draws).tolist() == codes


@given(
    x=st.lists(st.floats(-1.5, 1.5, width=32), min_size=1, max_size=8),
    case=st.sampled_from(ALL),
    draw=st.none() | st.integers(0, 2**16 - 1),
)
def test_any_value_equals_the_oracle(x, case, draw):
    x = np.array(x, dtype=np.float32)
    draws = None if draw is None else np.full(x.shape, draw * 2.0**-16, dtype=np.float32)
    codes, values = moment_oracle.encode(x, *case, draws)
    m = code_map(case[0], case[1], signed=case[2])
    got = encode(torch.from_numpy(x), m, None if draws is None else torch.from_numpy(draws))
    assert got.tolist() == codes
    assert decode(got, m).tolist() == [float(value) for value in values]


@pytest.mark.parametrize(("name", "bits", "signed"), ALL)
def test_nearest_is_nearest(name, bits, signed, rng):
    m = code_map(name, bits, signed=signed)
    values = code_values(m).double()
    x = torch.from_numpy(rng.choice([-1, 1] if signed else [1], 5000) * 10.0 ** rng.uniform(-12, 0, 5000)).float()
    best = (x.double()[:, None] - values).abs().min(dim=1).values
    error = (x.double() - decode(encode(x, m), m).double()).abs()
    assert (error <= best * (1 + 2.0**-20)).all()


@pytest.mark.parametrize(("name", "bits", "signed"), ALL)
def test_stochastic_rounding_is_unbiased_in_value(name, bits, signed, rng):
    m = code_map(name, bits, signed=signed)
    values = code_values(m).unique()  # sorted
    low = torch.from_numpy(rng.integers(0, len(values) - 1, 60))
    share = torch.from_numpy(rng.uniform(0, 1, 60)).float()
    x = values[low] + share * (values[low + 1] - values[low])
    num_draws = 4000
    draws = uniform16(fold_key(int(rng.integers(2**63))), (num_draws, 60))
    got = decode(encode(x.expand(num_draws, 60), m, draws), m).double()
    a, b = values[low].double(), values[low + 1].double()
    assert ((got == a) | (got == b)).all()
    p = (x.double() - a) / (b - a)
    deviation = (b - a) * (p * (1 - p) / num_draws).sqrt()
    error = got.mean(0) - x.double()
    assert (error.abs() <= 5 * deviation + (b - a) * 2.0**-15).all()
    assert (error / (b - a)).mean().abs() <= 5 * (p * (1 - p) / num_draws).mean().sqrt() / 60**0.5 + 2.0**-15


def test_dynamic_is_the_map_of_bitsandbytes():
    from bitsandbytes.functional import create_dynamic_map

    for signed in (True, False):
        ours = code_values(code_map("dynamic", 8, signed=signed))
        assert torch.allclose(ours, create_dynamic_map(signed), rtol=3e-7, atol=0)
        # bitsandbytes fills its map up to 256 with zeros.
        four = create_dynamic_map(signed, max_exponent_bits=3, total_bits=4)
        four = four[four != 0]
        ours = code_values(code_map("dynamic", 4, signed=signed))
        assert torch.allclose(ours[ours != 0], four, rtol=3e-7, atol=0)


def test_zero_and_its_codes():
    for name, bits, signed in ALL:
        m = code_map(name, bits, signed=signed)
        has_zero = signed or (bits == 8 and name != "float")
        assert (code_values(m) == 0).any() == has_zero
        if (name, signed) == ("float", True):
            assert encode(torch.tensor([0.0, -0.0]), m).tolist() == [0, 128]
            continue
        zero = encode(torch.tensor([0.0, -0.0]), m)
        assert zero.tolist() == [{("dynamic", 8): 127, ("dynamic", 4): 7}.get((name, bits), 0) if signed else 0] * 2
        assert (decode(zero, m) == 0).all() == has_zero
        assert not torch.signbit(decode(zero, m)).any()


def test_ranges_and_dtypes():
    for name, bits, signed in ALL:
        m = code_map(name, bits, signed=signed)
        assert m.dtype == (torch.int8 if signed and name in ("power", "linear") else torch.uint8)
        count = {
            ("float", 8, True): 256,
            ("dynamic", 8, True): 256,
            ("dynamic", 4, True): 16,
            ("dynamic", 4, False): 15,
        }
        assert len(all_codes(m)) == count.get((name, bits, signed), 2**bits - signed)
    # No byte may lead outside the table.
    assert decode(torch.tensor([15], dtype=torch.uint8), code_map("dynamic", 4, signed=False)) == 1


@pytest.mark.parametrize("exponent", [1, 2, 4, 8])
def test_other_exponents_and_offsets(exponent):
    for offset, levels in ((0, 255), (1, 16), (5, 20)):
        m = CodeMap("power", 8 if offset == 0 else 4, False, levels, offset, exponent)
        counts = torch.arange(offset, levels + 1).double()
        assert torch.allclose(code_values(m).double(), (counts / levels) ** exponent, rtol=2e-6, atol=0)
        assert torch.equal(encode(code_values(m), m).long(), all_codes(m))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "cubic"}, r"\(name\): got 'cubic'; allowed: float, power, linear, dynamic, log; "),
        ({"name": "float", "bits": 4}, r"\(bits\): got 4 with map float; allowed: 8; "),
        ({"bits": 2}, r"\(bits\): got 2 with map power; allowed: 8, 4; "),
        ({"bits": True}, r"\(bits\): got True with map power; allowed: "),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    arguments = {"name": "power", "bits": 8, **arguments}
    with pytest.raises(ValueError, match=message):
        code_map(signed=True, **arguments)


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match=r"register_map\(name\): got 'power'; allowed: a name other than float, power"):
        register_map("power", KINDS["linear"])
    with pytest.raises(ValueError, match="2 scales to a block"):
        register_map("two", KINDS["log"])
