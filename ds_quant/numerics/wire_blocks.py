"""Blocks of a piece on the wire: how their elements and scales become bytes, and back. `wire` says where these lie.

A piece's elements, fp32 [numel], are quantized in blocks of `block_size` by `format.quantize_to`. Elements of 8 bits
are integers, one byte each; those of 4 bits are integers from -7 to 7 or e2m1, packed by `packing.pack`. Scales, in
bytes:

    float    fp32, 4 a block                                      integers, fp4_e2m1
    e8m0     1 a block: the exponent plus 127, 255 for NaN        mxfp4
    e4m3     4 of the piece's scale, fp32, and 1 a block:         nvfp4, nvint4
             its part in e4m3, 0 for zeros, 127 for NaN

What NVFP4 calls the scale of the tensor is that of the piece here, so that pieces do not depend on each other. A value
is the element times the scale, a product in fp32 with no clamp; an e4m3 scale is itself a product in fp32, of its two
parts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ds_quant.base.number_formats import FORMATS
from ds_quant.numerics import integer, minifloat, packing
from ds_quant.numerics.format import (
    Format,
    Group,
    Integers,
    codes_by,
    e4m3_parts,
    named_format,
    quantize_to,
    scale_of,
)
from ds_quant.numerics.minifloat import E4M3, Minifloat
from ds_quant.numerics.scales import times_tensor

ROTATIONS = ("none", "hadamard")
BITS = (8, 4)
BLOCK_SIZES = tuple(2**exponent for exponent in range(5, 13))


class WireFormat(NamedTuple):
    """How the elements of a piece are written."""

    bits: int
    """8 or 4."""
    block_size: int
    """A power of two from 32 to 4096; of `mxfp4` 32, of `nvfp4` and `nvint4` 16."""
    rotation: str = "none"
    """"none" or "hadamard"."""
    format: str = ""
    """One of WIRE_FORMATS, of 4 bits. Empty: integers with fp32 scales."""
    scale_rule: str = "floor"
    """As `format.ScaleCodec` has it."""

    @property
    def elements(self) -> Format[Integers | Minifloat]:
        """How a piece is quantized, once it is rotated."""
        if self.format:
            return named_format(self.format, "block", self.block_size, scale_rule=self.scale_rule)
        return Format(Integers(self.bits), Group("block", self.block_size))

    @property
    def scale_kind(self) -> str:
        """How scales are stored: "float", "e8m0" or "e4m3"."""
        return FORMATS[self.format].scale if self.format else "float"


def num_blocks(numel: int, fmt: WireFormat) -> int:
    """Blocks of a piece of `numel` elements."""
    return -(-numel // fmt.block_size)


def scale_bytes(numel: int, fmt: WireFormat) -> int:
    """Bytes of the scales of a piece of `numel` elements."""
    blocks = num_blocks(numel, fmt)
    return {"float": 4 * blocks, "e8m0": blocks, "e4m3": 4 + blocks}[fmt.scale_kind]


def code_bytes(numel: int, fmt: WireFormat) -> int:
    """Bytes of the codes of a piece of `numel` elements."""
    return packing.code_bytes(numel, fmt.block_size, fmt.bits)


def to_bytes(y: Tensor, fmt: WireFormat, key: Tensor | None) -> tuple[Tensor, Tensor]:
    """(scales, codes) of a piece, fp32 [numel] with numel > 0: uint8 [scale_bytes], uint8 [code_bytes].

    key: of stochastic rounding; None: to nearest.
    """
    elements = fmt.elements
    if not fmt.format:
        q = quantize_to(y, elements, rounding="nearest" if key is None else "stochastic", key=key)
        packed = packing.pack(q.codes, fmt.block_size, fmt.bits) if fmt.bits < 8 else q.codes.view(torch.uint8)
        return q.scale.view(torch.uint8), packed
    absmax = integer.reduce_groups(y.abs(), torch.amax, "block", fmt.block_size)
    if fmt.scale_kind == "e4m3":
        block, tensor = e4m3_parts(y, absmax, elements)
        scale = times_tensor(block, tensor, absmax)
        part = minifloat.encode(torch.where(absmax > 0, block, 0.0), E4M3)
        part = torch.where(absmax.isfinite(), part, E4M3.nan or 0).to(torch.uint8)
        stored = torch.cat((tensor.reshape(1).view(torch.uint8), part))
    else:
        scale = scale_of(y, absmax, elements)
        stored = scale.view(torch.uint8)
        if fmt.scale_kind == "e8m0":
            # The exponent field of an fp32 number: 0 of 2^-127, which is denormal, and 255 of NaN.
            stored = ((scale.view(torch.int32) >> 23) & 255).to(torch.uint8)
    codes = codes_by(y, scale, elements, key)
    return stored, packing.pack(codes, fmt.block_size, fmt.bits)


def scales_from(scales: Tensor, fmt: WireFormat) -> Tensor:
    """fp32 [num_blocks] of the bytes of the scales, at any address; NaN of a block with an Inf or a NaN."""
    if fmt.scale_kind == "float":
        return scales.clone().view(torch.float32)
    if fmt.scale_kind == "e8m0":
        exponent = scales.to(torch.int32) - 127
        return torch.where(exponent < 128, minifloat.power_of_two(exponent.clamp(max=127)), torch.nan)
    return minifloat.decode(scales[4:], E4M3) * scales[:4].clone().view(torch.float32)


def values_from(scales: Tensor, codes: Tensor, numel: int, fmt: WireFormat) -> Tensor:
    """The values of a piece, fp32 [numel], from its bytes."""
    elements = fmt.elements.elements
    if isinstance(elements, Minifloat):
        table = _table(elements.name, codes.device)
        steps = table[packing.unpack(codes, numel, fmt.block_size, signed=False, bits=fmt.bits).to(torch.int64)]
    elif fmt.bits < 8:
        steps = packing.unpack(codes, numel, fmt.block_size, signed=True, bits=fmt.bits).float()
    else:
        steps = codes.view(torch.int8).float()
    return steps * integer.expand_groups(scales_from(scales, fmt), steps, "block", fmt.block_size)


def _table(name: str, device: torch.device) -> Tensor:
    """The values of all codes."""
    elements = minifloat.MINIFLOATS[name]
    return minifloat.decode(torch.arange(1 << elements.bits, dtype=torch.uint8, device=device), elements)
