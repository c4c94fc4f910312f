"""The map `log`, with two scales to a block, against its oracle, bit for bit, and what holds for any input."""

import itertools

import pytest
import torch
from numerics import moment_oracle
from numerics.block_inputs import BLOCK_SIZE, KINDS, assert_equal, make_input

from ds_quant.numerics import code_map, code_values, dequantize_blockwise, fold_key, quantize_blockwise
from ds_quant.numerics.log_codes import LEAST

LOG = code_map("log", 4, signed=False)
LENGTHS = (0, 1, 2, 31, 32, 33, 63, 65, 97, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quantized(x, key=None, offset=0, block_size=BLOCK_SIZE):
    rounding = "nearest" if key is None else "stochastic"
    return quantize_blockwise(x, LOG, block_size=block_size, rounding=rounding, key=key, offset=offset)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("signed", [False, True])
def test_codes_scales_and_values_equal_the_oracle(signed, rounding, rng):
    dtypes = itertools.cycle(DTYPES)
    for kind, length in itertools.product(KINDS, LENGTHS):
        dtype = next(dtypes)
        x = make_input(rng, kind, length, signed, dtype)
        key, offset = None, 0
        if rounding == "stochastic":
            key, offset = fold_key(int(rng.integers(2**63))), int(rng.choice([0, 32, 2**32 - 32, 2**40]))
        words = None if key is None else tuple(key.tolist())
        codes, scale, values = moment_oracle.quantize_log(x.float().numpy(), BLOCK_SIZE, words, offset)
        print(kind.__name__, length, dtype)
        q = quantized(x, key, offset)
        assert q.codes.tolist() == moment_oracle.pack(codes, BLOCK_SIZE)
        assert_equal(q.scale, torch.from_numpy(scale))
        assert_equal(dequantize_blockwise(q), torch.from_numpy(values))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_what_was_decoded_gets_its_codes_back(rounding, rng):
    """As it must for states that go through fp32: the ends of a block come back as they are."""
    for kind in KINDS:
        x = make_input(rng, kind, 4096, False)
        key = fold_key(int(rng.integers(2**63))) if rounding == "stochastic" else None
        q = quantized(x, key)
        again = quantized(dequantize_blockwise(q))
        assert torch.equal(again.codes, q.codes), kind.__name__
        assert_equal(again.scale, q.scale)


def test_the_mean_of_stochastic_roundings_is_the_value(rng):
    x = torch.from_numpy(rng.lognormal(sigma=2, size=BLOCK_SIZE)).float()
    draws = 1000
    roundings = torch.stack([dequantize_blockwise(quantized(x, fold_key(i))) for i in range(draws)])
    high, low = quantized(x).scale.numpy()
    table = torch.tensor(moment_oracle.log_values(high, low)) * high
    below = (torch.searchsorted(table, x, right=True) - 1).clamp(0, 14)
    # The variance of one rounding between the values beside x; six deviations of the mean: once in 5e8 elements. What
    # is near a code goes up too rarely for a normal distribution: at most 20 times where once is expected.
    variance = ((x - table[below]) * (table[below + 1] - x)).clamp(min=0)
    bound = 6 * (variance / draws).sqrt() + 0.02 * (table[below + 1] - table[below])
    assert ((roundings.mean(dim=0) - x).abs() <= bound).all()


def test_codes_cover_what_the_block_has():
    for octaves in (1.0, 4.0, 12.0):
        x = torch.exp2(torch.linspace(-octaves, 0, BLOCK_SIZE)) * 3e-9
        values = dequantize_blockwise(quantized(x))
        # Half a step, if all had the same ratio. The steps of 32nd roots are up to twice as wide at the low end here.
        step = 2 ** (octaves / 15) - 1
        assert ((values - x).abs() / x).max() < step
        assert values[0] == x[0]
        assert values[-1] == x[-1]


def test_elements_that_are_zero_count_as_the_least():
    x = torch.tensor([0.0, 1.0, 0.5, 0.25] * 8)
    values = dequantize_blockwise(quantized(x))
    assert torch.equal(values[0::4], torch.full((8,), LEAST))
    assert torch.equal(values[1::4], x[1::4])


def test_the_map_itself():
    assert (LOG.scales, LOG.highest, LOG.dtype) == (2, 15, torch.uint8)
    values = code_values(LOG)
    assert values[0] == LEAST
    assert values[-1] == 1.0
    assert (values.diff() > 0).all()
    with pytest.raises(ValueError, match="signed"):
        code_map("log", 4, signed=True)
    with pytest.raises(ValueError, match="bits"):
        code_map("log", 8, signed=False)


def test_ranges_of_blocks_have_their_scales(rng):
    q = quantized(make_input(rng, KINDS[0], 150, False))
    assert torch.equal(dequantize_blockwise(q.block_range(1, 3)), dequantize_blockwise(q)[32:96])
    assert torch.equal(dequantize_blockwise(q.block_range(4, 5)), dequantize_blockwise(q)[128:])
