"""Packed codes: every number of bits, and blocks of any length, against a packing bit by bit."""

import numpy as np
import pytest
import torch

from ds_quant.numerics.packing import PLANES, code_bytes, pack, packed_bytes, unpack


def packed_bit_by_bit(codes, block_size, bits):
    """The bytes of the module docstring, by Python integers."""
    found = []
    for start in range(0, len(codes), block_size):
        block, low_end = codes[start : start + block_size], 0
        for width in PLANES[bits]:
            plane = [0] * -(-len(block) * width // 8)
            for number, code in enumerate(block):
                field = (code % 2**bits >> low_end) % 2**width
                plane[number % len(plane)] |= field << (number // len(plane) * width)
            found += plane
            low_end += width
    return found


@pytest.mark.parametrize("bits", sorted(PLANES))
def test_bytes_are_those_of_the_definition(rng, bits):
    for numel in (0, 1, 2, 7, 8, 9, 31, 64, 65, 200):
        for block_size in (1, 3, 8, 32, 50, 64):
            codes = rng.integers(2**bits, size=numel)
            packed = pack(torch.from_numpy(codes), block_size, bits)
            assert packed.dtype == torch.uint8
            assert packed.tolist() == packed_bit_by_bit(codes.tolist(), block_size, bits)
            assert len(packed) == packed_bytes(numel, block_size, bits) == code_bytes(numel, block_size, bits)
            back = unpack(packed, numel, block_size, signed=False, bits=bits)
            assert (back.dtype, back.tolist()) == (torch.uint8, codes.tolist())


@pytest.mark.parametrize("bits", sorted(PLANES))
def test_signed_codes_come_back(rng, bits):
    codes = torch.from_numpy(rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), size=77)).to(torch.int8)
    back = unpack(pack(codes, 32, bits), 77, 32, signed=True, bits=bits)
    assert torch.equal(back, codes)
    assert back.dtype == torch.int8


@pytest.mark.parametrize("bits", sorted(PLANES))
def test_whole_blocks_waste_nothing(bits):
    assert sum(PLANES[bits]) == bits
    assert packed_bytes(4096, 64, bits) == 4096 * bits // 8
    assert code_bytes(4096, 64, 8) == 4096
    assert np.all(np.diff(PLANES[bits]) < 0)
