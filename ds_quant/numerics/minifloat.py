"""Floating point of 4, 6 and 8 bits: codes of values, and back.

A code of 1 + E + M bits is sign, exponent field f and mantissa field t. With bias = 2^(E-1) - 1:

    f = 0    (-1)^sign * t * 2^(1 - bias - M)                 zero and the subnormal values
    f > 0    (-1)^sign * (2^M + t) * 2^(f - bias - M)

    name    E  M  largest  smallest   what else there is
    e4m3    4  3    448      2^-9     0x7f and 0xff are NaN; no Inf                      OCP OFP8 1.0
    e5m2    5  2  57344      2^-16    f = 31 is Inf (t = 0) or NaN, as in IEEE 754       OCP OFP8 1.0
    e2m3    2  3    7.5      2^-3     nothing                                            OCP MX 1.0
    e3m2    3  2     28      2^-4     nothing                                            OCP MX 1.0
    e2m1    2  1      6      2^-1     nothing                                            OCP MX 1.0

Values round to the nearest, ties to the even code, or stochastically: x between two neighbours a < b becomes b with
probability (x - a) / (b - a). What lies beyond the largest value becomes the largest value, Inf included (saturation).
-0.0 and what rounds to it keep their sign. A NaN becomes a NaN where there is one, else 0.

All values are exact in bf16 and fp16, and so is each step of the arithmetic below in fp32.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Minifloat(NamedTuple):
    """A format of elements in floating point."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    largest: float
    nan: int | None
    """The code of NaN without its sign; None where there is none."""

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def smallest_exponent(self) -> int:
        """Of normal values: 1 - bias."""
        return 2 - (1 << (self.exponent_bits - 1))


E4M3 = Minifloat("e4m3", 4, 3, 448.0, 0x7F)
E5M2 = Minifloat("e5m2", 5, 2, 57344.0, 0x7E)
E2M3 = Minifloat("e2m3", 2, 3, 7.5, None)
E3M2 = Minifloat("e3m2", 3, 2, 28.0, None)
E2M1 = Minifloat("e2m1", 2, 1, 6.0, None)
MINIFLOATS = {fmt.name: fmt for fmt in (E4M3, E5M2, E2M3, E3M2, E2M1)}


def encode(x: Tensor, fmt: Minifloat, draws: Tensor | None = None) -> Tensor:
    """Codes, uint8, of `x`, fp32. draws: fp32 in [0, 1) of x's shape for stochastic rounding; None rounds to nearest.

    The difference of the sign apart, a code is the number of values from 0 on.
    """
    magnitude = x.abs().clamp(max=fmt.largest)
    # Below the smallest normal value (and of an fp32 that is denormal itself) steps are those of the first binade.
    exponent = ((magnitude.view(torch.int32) >> 23) - 127).clamp(min=fmt.smallest_exponent)
    steps = magnitude * power_of_two(fmt.mantissa_bits - exponent)
    if draws is None:
        count = torch.round(steps)
    else:
        # Of a negative number the lower neighbour is the one that is larger in magnitude.
        whole = torch.floor(steps)
        rest = steps - whole
        count = whole + torch.where(x < 0, draws >= 1 - rest, draws < rest)
    codes = torch.where(x.isnan(), 0.0, count).to(torch.int32)
    codes = codes + ((exponent - fmt.smallest_exponent) << fmt.mantissa_bits)
    codes = torch.where(x.isnan(), fmt.nan or 0, codes)
    return (codes | (torch.signbit(x).to(torch.int32) << (fmt.bits - 1))).to(torch.uint8)


def decode(codes: Tensor, fmt: Minifloat) -> Tensor:
    """Values, fp32, of codes, uint8."""
    wide = codes.to(torch.int32)
    magnitude = wide & ((1 << (fmt.bits - 1)) - 1)
    field = magnitude >> fmt.mantissa_bits
    mantissa = magnitude & ((1 << fmt.mantissa_bits) - 1)
    count = torch.where(field > 0, mantissa + (1 << fmt.mantissa_bits), mantissa).float()
    value = count * power_of_two(field.clamp(min=1) - 1 + (fmt.smallest_exponent - fmt.mantissa_bits))
    if fmt.nan is not None:
        if fmt.name == "e5m2":
            value = torch.where(magnitude == 0x7C, torch.inf, value)
            value = torch.where(magnitude > 0x7C, torch.nan, value)
        else:
            value = torch.where(magnitude == fmt.nan, torch.nan, value)
    return torch.where(wide >> (fmt.bits - 1) != 0, -value, value)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent, fp32, exact, for int32 from -149 to 127."""
    normal = (exponent + 127).clamp(min=0) << 23
    denormal = torch.ones_like(exponent) << (exponent + 149).clamp(0, 22)
    return torch.where(exponent >= -126, normal, denormal).view(torch.float32)
