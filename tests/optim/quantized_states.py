"""What the tests of quantized states share: making them, and what their codes stand for."""

import itertools

import numpy as np
import torch

from ds_quant.numerics import code_map, dequantize_blockwise, quantize_blockwise
from ds_quant.numerics.codes import BITS, MAPS
from ds_quant.optim.state import QuantizedState

ALL = [case for case in itertools.product(MAPS, BITS, (True, False)) if case[:2] != ("float", 4)]
SOME = [
    ("float", 8, True),
    ("power", 8, False),
    ("power", 4, True),
    ("dynamic", 4, False),
    ("linear", 8, True),
    ("log", 4, False),
]
"""Cases that get codes and scales back from what was dequantized: see moment.py on the signed dynamic map."""
BLOCK_SIZE = 32


def values_of(rng, shape, signed):
    values = torch.from_numpy(np.asarray(rng.normal(scale=1e-3, size=shape))).float()
    return values if signed else values.square()


def make(rng, shape, case=("power", 4, True), block_size=BLOCK_SIZE, stream=5):
    name, bits, signed = case
    values = values_of(rng, shape, signed)
    return QuantizedState.quantize(values, code_map(name, bits, signed=signed), block_size, stream=stream)


def plain(moment):
    """What the codes stand for, without the class under test."""
    return dequantize_blockwise(moment.blocks)


def quantize(values, like):
    """`values` to nearest, as `like` is stored."""
    return quantize_blockwise(values.reshape(-1), like.blocks.code_map, block_size=like.blocks.block_size)
