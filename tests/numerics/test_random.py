import itertools
import math

import numpy as np
import pytest
import torch
from numerics import oracle

from ds_quant.numerics import derive_key, fold_key, random_bits, uniform
from ds_quant.numerics.random import derive_many, derive_words

KEY = (0x05790411, 0x1899FB8C)
"""fold_key(1234, 567, 8, 9, 10)"""

# Written down, so that a kernel in another language can be held against them and no change goes unnoticed.
KNOWN_KEYS = [
    ((0,), (0x9DCF5631, 0x4DA056E2)),
    ((1,), (0xA01771FC, 0x49D83615)),
    ((0, 1), (0xFFEF2523, 0xBF16F799)),
    ((0, 0, 1), (0xC9EF7D78, 0x32AB5604)),
    ((0, 0, 0, 1), (0x623214E9, 0x2C941E6A)),
    ((0, 0, 0, 0, 1), (0x9CFC0ECA, 0x26C0ECDA)),
    ((1234, 567, 8, 9, 10), KEY),
    ((2**64 - 1, 2**32, 0, 0, 0), (0xDBE6CCB1, 0xFC4B6E43)),
]
KNOWN_BITS = [
    (0x0, 0x0D64F7A9),
    (0x1, 0x09FF93A6),
    (0x2, 0x2D6D4ECD),
    (0xFF, 0x13ACBFED),
    (0x80000000, 0x96BFD4B2),
    (0xFFFFFFFF, 0xBD25A9CF),
    (0x100000000, 0xEB286AA5),
    (0x100000001, 0x333D343F),
    (0x10000003039, 0xCA47F542),
    (0x4000000000000000, 0xD0AEBCCF),
]
SAMPLES = 2**20


def key_tensor(key):
    return torch.tensor(key, dtype=torch.int64)


def ones_per_bit(values):
    return torch.stack([(values >> bit & 1).sum() for bit in range(32)]).double()


@pytest.mark.parametrize(("counters", "expected"), KNOWN_KEYS)
def test_fold_key_gives_the_known_keys(counters, expected):
    assert oracle.fold_key(*counters) == expected
    key = fold_key(*counters)
    assert key.dtype == torch.int64
    assert tuple(key.tolist()) == expected


@pytest.mark.parametrize(("index", "expected"), KNOWN_BITS)
def test_random_bits_gives_the_known_bits(index, expected):
    assert oracle.bits(KEY, index) == expected
    assert random_bits(key_tensor(KEY), 1, offset=index).tolist() == [expected]


@pytest.mark.parametrize("offset", [0, 1, 2**31 - 50, 2**32 - 50, 2**40 + 3])
def test_random_bits_equals_the_oracle(offset):
    bits = random_bits(key_tensor(KEY), (3, 37), offset=offset)
    assert bits.dtype == torch.int64
    assert bits.flatten().tolist() == [oracle.bits(KEY, offset + i) for i in range(111)]


def test_derive_key_equals_the_oracle():
    for stream in (0, 1, 7, 2**32 - 1, 2**32, 2**64 - 1):
        assert tuple(derive_key(key_tensor(KEY), stream).tolist()) == oracle.derive_key(KEY, stream)


def test_uniform_is_the_upper_24_bits():
    bits = random_bits(key_tensor(KEY), SAMPLES)
    numbers = uniform(key_tensor(KEY), SAMPLES)
    assert numbers.dtype == torch.float32
    assert torch.equal(numbers.double() * 2**24, (bits // 256).double())
    assert 0 <= numbers.min() < 2**-16
    assert 1 - 2**-16 < numbers.max() < 1
    assert numbers[:50].tolist() == oracle.uniform(KEY, 50).tolist()


@pytest.mark.parametrize("shape", [(), (0,), (5,), (0, 3), (2, 3, 4), torch.Size([4, 2]), 6])
def test_shapes_follow_the_row_major_index(shape):
    key = key_tensor(KEY)
    expected_shape = (shape,) if isinstance(shape, int) else tuple(shape)
    for draw in (random_bits, uniform):
        drawn = draw(key, shape)
        assert drawn.shape == expected_shape
        assert torch.equal(drawn.flatten(), draw(key, math.prod(expected_shape)))


@pytest.mark.parametrize("offset", [1, 17, 64])
def test_offset_continues_the_same_stream(offset):
    key = fold_key(5)
    for start in (0, 2**32 - 40):
        whole = random_bits(key, 100, offset=start)
        assert torch.equal(whole[offset:], random_bits(key, 100 - offset, offset=start + offset))
        assert torch.equal(uniform(key, 100, offset=start)[offset:], uniform(key, 100 - offset, offset=start + offset))


def test_no_generator_is_consumed():
    before = torch.get_rng_state()
    key = derive_key(fold_key(1, 2, 3, 4, 5), 6)
    random_bits(key, 10)
    uniform(key, 10)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("shift", [0, 8, 16, 24])
@pytest.mark.parametrize("offset", [0, 2**32 - SAMPLES // 2])
def test_every_byte_is_uniform(shift, offset):
    counts = torch.bincount(random_bits(fold_key(11), SAMPLES, offset=offset) >> shift & 255, minlength=256).double()
    expected = SAMPLES / 256
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    # 255 degrees of freedom: mean 255, variance 510; five standard deviations either way.
    assert abs(chi_square - 255) < 5 * math.sqrt(510)


def test_every_bit_is_balanced():
    ones = ones_per_bit(random_bits(fold_key(12), SAMPLES))
    assert (ones - SAMPLES / 2).abs().max() < 5 * math.sqrt(SAMPLES) / 2


def test_flipping_any_input_bit_flips_every_output_bit_half_of_the_time():
    num_keys, num_indices = 64, 64
    total = num_keys * num_indices

    def draw(index_flip=0, key_flip=(0, 0)):
        keys = [fold_key(seed) ^ torch.tensor(key_flip) for seed in range(num_keys)]
        # Aligned starts: flipping an index bit above bit 5 is another offset, below it a reordering.
        order = torch.arange(num_indices) ^ (index_flip & 63)
        offset = 2**33 ^ (index_flip & ~63)
        return torch.cat([random_bits(key, num_indices, offset=offset)[order] for key in keys])

    plain = draw()
    flips = [{"index_flip": 1 << bit} for bit in range(40)]
    flips += [{"key_flip": (1 << bit, 0)} for bit in range(32)] + [{"key_flip": (0, 1 << bit)} for bit in range(32)]
    changed = torch.stack([ones_per_bit(plain ^ draw(**flip)) for flip in flips])
    # 104 * 32 cells: six standard deviations is crossed by chance once in 10^5 draws of keys.
    assert (changed - total / 2).abs().max() < 6 * math.sqrt(total) / 2


def neighbours():
    """Pairs of keys of places next to each other in a run."""
    base = {"seed": 7, "step": 100, "micro_step": 3, "rank": 5, "stream": 2}
    key = fold_key(**base)
    for name, value in base.items():
        yield name, key, fold_key(**{**base, name: value + 1})
        yield name + " (high word)", key, fold_key(**{**base, name: value + 2**32})
    yield "derived", derive_key(key, 0), derive_key(key, 1)
    yield "derived from its parent", key, derive_key(key, 0)
    yield "derived and folded", derive_key(fold_key(7), 1), fold_key(7, stream=1)


@pytest.mark.parametrize(("name", "first", "second"), [pytest.param(*pair, id=pair[0]) for pair in neighbours()])
def test_neighbouring_keys_are_unrelated(name, first, second):
    assert (first != second).all()
    x, y = random_bits(first, SAMPLES), random_bits(second, SAMPLES)
    assert (ones_per_bit(x ^ y) - SAMPLES / 2).abs().max() < 5 * math.sqrt(SAMPLES) / 2
    # Two independent uniforms: the product of the centred values has mean 0 and standard deviation 1/12.
    for lag in (0, 1, 2):
        centred = (uniform(first, SAMPLES)[lag:] - 0.5).double(), (uniform(second, SAMPLES - lag) - 0.5).double()
        assert abs((centred[0] * centred[1]).mean().item()) < 5 / 12 / math.sqrt(SAMPLES - lag)


def test_successive_elements_are_unrelated():
    numbers = uniform(fold_key(13), SAMPLES).double() - 0.5
    for lag in (1, 2, 3, 64, 4096):
        assert abs((numbers[lag:] * numbers[:-lag]).mean().item()) < 5 / 12 / math.sqrt(SAMPLES - lag)


def test_all_keys_differ():
    keys = {tuple(fold_key(*counters).tolist()) for counters in itertools.product(range(4), repeat=5)}
    assert len(keys) == 4**5
    halves = list(zip(*keys, strict=True))
    # 1024 draws out of 2^32: one collision in either half is a matter of 10^-4.
    assert [len(set(half)) for half in halves] == [4**5, 4**5]
    subkeys = {tuple(derive_key(fold_key(1), stream).tolist()) for stream in range(1000)}
    assert len(subkeys) == 1000


@pytest.mark.thorough
def test_compiled_bits_are_the_eager_bits_for_every_key_without_recompilation():
    def draw(key):
        subkey = derive_key(key, 3)
        # The second draw starts just below 2^32 and runs past it.
        return random_bits(key, (7, 133)), random_bits(subkey, 300, offset=2**32 - 150), uniform(subkey, (5, 77))

    torch._dynamo.reset()
    compiled = torch.compile(draw, fullgraph=True)
    compiled(fold_key(0))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(5):
            key = fold_key(seed, step=seed)
            for got, expected in zip(compiled(key), draw(key), strict=True):
                assert torch.equal(got, expected)


@pytest.mark.parametrize("value", [-1, 2**64, 1.0, "1", None])
@pytest.mark.parametrize("name", ["seed", "step", "micro_step", "rank", "stream"])
def test_counters_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"fold_key\({name}\): got .*; allowed: integers from 0 to 2\^64 - 1; "):
        fold_key(**{"seed": 0, name: value})


def test_derive_key_refuses_a_negative_stream():
    with pytest.raises(ValueError, match=r"derive_key\(stream\): got -1; allowed: "):
        derive_key(fold_key(0), -1)


@pytest.mark.parametrize("key", [(1, 2), torch.zeros(2), torch.zeros(3, dtype=torch.int64), None])
def test_what_is_no_key_is_refused(key):
    for draw in (random_bits, uniform):
        with pytest.raises(ValueError, match=r"random_bits\(key\): got .*; allowed: an int64 tensor of shape \(2,\); "):
            draw(key, 3)
    with pytest.raises(ValueError, match=r"derive_key\(key\): got "):
        derive_key(key, 3)


def test_many_streams_at_once():
    streams = [0, 1, 2**31, 2**32 - 1, 2**32, 2**63 + 5, 2**64 - 1]
    for key in (KEY, (0, 0), (2**32 - 1, 2**32 - 1)):
        found = derive_many(key, np.array(streams, dtype=np.uint64))
        assert found.dtype == np.int64
        assert [tuple(words) for words in found.T.tolist()] == [derive_words(key, stream) for stream in streams]
