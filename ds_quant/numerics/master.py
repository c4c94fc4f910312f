"""Master weights of 24 or 16 bits: what is left of an fp32 number once its last 8 or 16 bits are rounded off.

A 24-bit master is kept as the bf16 weight that the model computes with and a remainder of 8 bits. With u the bits of
the fp32 number as an unsigned integer:

    m         = (u + r) >> 8                 r = 128: to nearest, ties away from zero; or a random number from 0 to 255
    weight    = (m + 128) >> 8               the 16 bits of the bf16 weight: m rounded to nearest, ties away from zero
    remainder = m - (weight << 8)            from -128 to 127
    master    = (weight << 8) + remainder    the 24 upper bits of an fp32 number whose last 8 are 0

A carry out of the mantissa goes on into the exponent, as it should. What is not finite keeps its meaning: Inf stays,
and every NaN becomes the quiet one. A finite number within half a bf16 step of 2^128 has a weight of Inf, as any
rounding to bf16 gives it, and keeps its master.

The same split with 8 more bits is in FlashOptim (arXiv 2602.23349); stochastically rounded bf16 weights without masters
are in "Revisiting BFloat16 Training" (arXiv 2010.06192).
"""

import torch
from torch import Tensor

from ds_quant.numerics.random import bits_at

_QUIET_NAN = 0x7FC00000


def split_master(values: Tensor, key: tuple[int, int] | None = None, *, offset: int = 0) -> tuple[Tensor, Tensor]:
    """(weight, remainder) of fp32 `values` of any shape: bf16 and int8 of the same shape.

    With a key (`random.derive_words`) the 24 bits are rounded stochastically: element i draws from its row-major index
    plus `offset`. Without one they are rounded to nearest.
    """
    bits, kept = _clean_bits(values), torch.isfinite(values)
    noise = 128 if key is None else (_random(key, values, offset) >> 24).to(torch.int32)
    top = torch.where(kept, bits + noise, bits) >> 8
    # A number that is rounded up to Inf by its 24 bits is no master: the largest one stays.
    top = torch.where(kept & (top & 0x7FFFFF >= 0x7F8000), top - 1, top)
    weight = (top + 128) >> 8
    return weight.to(torch.int16).view(torch.bfloat16), (top - (weight << 8)).to(torch.int8)


def join_master(weight: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 masters of a bf16 weight and an int8 remainder of one shape."""
    high = weight.view(torch.int16).to(torch.int32)
    return (((high << 8) + remainder.to(torch.int32)) << 8).view(torch.float32)


def round_weight(values: Tensor, key: tuple[int, int] | None = None, *, offset: int = 0) -> Tensor:
    """bf16 weights of fp32 `values`, of the same shape, for training without masters.

    With a key, up or down with probabilities that make the expected weight the value; without one to nearest, ties to
    even. What is not finite stays so.
    """
    bits = _clean_bits(values)
    noise = 0x7FFF + ((bits >> 16) & 1) if key is None else (_random(key, values, offset) >> 16).to(torch.int32)
    rounded = torch.where(torch.isfinite(values), bits + noise, bits) >> 16
    return rounded.to(torch.int16).view(torch.bfloat16)


def _clean_bits(values: Tensor) -> Tensor:
    """The bits as int32, with one NaN for all. Shifts to the right keep the sign in front."""
    return values.contiguous().view(torch.int32).masked_fill(values.isnan(), _QUIET_NAN)


def _random(key: tuple[int, int], like: Tensor, offset: int) -> Tensor:
    index = torch.arange(like.numel(), dtype=torch.int64, device=like.device) + offset
    return bits_at(key, index).reshape(like.shape)
