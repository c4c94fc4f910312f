"""Scales that take 8 bits: from the largest magnitude of each block to the fp32 number that multiplies its codes.

    e8m0   a power of two, 2^-127 to 2^127, one for each block (OCP MX 1.0). With `largest` the largest element:
             floor   2^(floor(log2 absmax) - floor(log2 largest)), section 6.3 of the specification: what lies between
                     `largest` and the next power of two then saturates
             up      the smallest power of two with absmax / scale <= largest (arXiv 2506.08027): nothing saturates
    e4m3   a number in fp8 for each block, times one fp32 number for the tensor (NVFP4):
             tensor  max(absmax) / (448 * largest)
             block   absmax / largest / tensor, rounded to e4m3, at least its smallest value 2^-9; the scale is
                     block * tensor in fp32

MXINT8's elements have an implied factor of 2^-6 in the specification: its integers from -127 to 127 take the scale
2^-6 * e8m0, with `largest` 127/64.

Blocks of zeros have scale 0 in e4m3 and 2^-127 in e8m0. A block with an Inf or a NaN has scale NaN, and counts for no
other block: the tensor's scale comes from the finite ones.
"""

import math

import torch
from torch import Tensor

from ds_quant.numerics.integer import divide, divide_to_fit
from ds_quant.numerics.minifloat import E4M3, decode, encode, power_of_two

_SMALLEST_E4M3 = 2.0**-9
LARGEST_WITH_ROOM = 256.0
"""Of a block's part of the scale, where another rule may enlarge it by up to 448 / 256."""


def e8m0_scale(absmax: Tensor, largest: float, rule: str, implied: int = 0) -> Tensor:
    """fp32 of absmax's shape. `implied`: the specification takes the elements for multiples of 2^-implied."""
    mantissa, exponent = math.frexp(largest)  # of mantissas from 1/2 on
    bits = absmax.contiguous().view(torch.int32)
    shared = (bits >> 23) - 127 - (exponent - 1 - implied)
    if rule == "up":
        shared = shared + ((bits & 0x7FFFFF) > int((2 * mantissa - 1) * 2**23)).to(torch.int32)
    # Denormal numbers seem to have an exponent of -127: the smallest that there is, anyway.
    scale = power_of_two(shared.clamp(-127, 127) - implied)
    return torch.where(absmax.isfinite(), scale, torch.nan)


def parts_by_largest(absmax: Tensor, largest: float, largest_block: float = E4M3.largest) -> tuple[Tensor, Tensor]:
    """(block, tensor), the parts of e4m3 scales: fp32 of absmax's shape and of no dimension.

    largest_block: what the tensor's scale makes of the largest block.
    """
    tensor = divide_to_fit(largest_finite(absmax), largest_block * largest)
    return e4m3_blocks(absmax, largest, tensor), tensor


def largest_finite(absmax: Tensor) -> Tensor:
    """fp32 of no dimension; 0 where there is none."""
    known = torch.where(absmax.isfinite(), absmax, 0.0)
    return known.amax() if known.numel() else known.new_zeros(())


def e4m3_blocks(absmax: Tensor, largest: float, tensor: Tensor) -> Tensor:
    """The blocks' part of the scale, a value of e4m3; 0 in a tensor of zeros."""
    known = torch.where(absmax.isfinite(), absmax, 0.0)
    in_units = torch.where(tensor > 0, divide(divide(known, largest), tensor.expand_as(known)), 0.0)
    return decode(encode(in_units.clamp(min=_SMALLEST_E4M3), E4M3), E4M3)


def times_tensor(block: Tensor, tensor: Tensor, absmax: Tensor) -> Tensor:
    """The scale; 0 for blocks of zeros, NaN for those with an Inf or a NaN."""
    return torch.where(absmax.isfinite(), torch.where(absmax > 0, block * tensor, 0.0), torch.nan)
