"""A format: what a quantized tensor is made of, whichever part of training it belongs to.

    Format    =  elements                      +  group                     +  scale
                 how a value in units of its      which elements share it      how it is stored
                 scale becomes a code

Elements are `Integers`, evenly spaced (operands of linear layers, gradients on the wire; defined in `integer`), a
`Minifloat` (operands of linear layers; `minifloat`), or a `CodeMap` (states of optimizers; `codes`, `blockwise`). They
say what the scale is, too: the largest magnitude over the levels of integers or the largest floating-point value, the
largest magnitude itself for a map. Scales are fp32, or take 8 bits (`scales`).

`base.number_formats` has the formats that go by one name:

    fp8_e4m3, fp8_e5m2, fp6_e2m3, fp6_e3m2, fp4_e2m1    a Minifloat, fp32 scales, any group
    mxfp8, mxfp6, mxfp4, mxint8    e4m3, e2m3, e2m1, 8-bit integers; blocks of 32 with an E8M0 scale (OCP MX 1.0)
    nvfp4, nvint4                  e2m1, 4-bit integers; blocks of 16 with an E4M3 scale, and one fp32 for the tensor
                                   (NVFP4 of NVIDIA's Blackwell; NVINT4 of arXiv 2510.25602)

Linear layers, states of optimizers and messages each hold a Format; `docs/extending.md` says what a new one touches.
"""

from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ds_quant.base.number_formats import FORMATS, FOUR_SIX, MS_EDEN
from ds_quant.numerics.codes import CodeMap
from ds_quant.numerics.four_six import four_six_parts
from ds_quant.numerics.integer import (
    Quantized,
    check_arguments,
    code_range,
    dequantize,
    expand_groups,
    in_steps,
    quantize,
    reduce_groups,
    round_steps,
    symmetric_levels,
    symmetric_scale,
)
from ds_quant.numerics.minifloat import MINIFLOATS, Minifloat, encode
from ds_quant.numerics.random import uniform
from ds_quant.numerics.scales import LARGEST_WITH_ROOM, e8m0_scale, parts_by_largest, times_tensor


class Integers(NamedTuple):
    """Evenly spaced values, as `integer` has them."""

    bits: int
    symmetric: bool = True
    full_range: bool = False
    """All 2^bits codes of a symmetric range."""

    @property
    def levels(self) -> float:
        """`symmetric_levels`, of symmetric ones."""
        return symmetric_levels(self.bits, full_range=self.full_range)

    @property
    def code_range(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        return code_range(self.levels) if self.symmetric else (0, (1 << self.bits) - 1)


class Group(NamedTuple):
    """Which elements share a scale: "tensor", "row", "column" or "block", as `integer` has them."""

    granularity: str
    block_size: int = 128
    """Counts for "block" only."""
    block_rows: int = 1
    """Rows of a matrix that a block covers: scales are found for all of them, and stored for each."""


class ScaleCodec(NamedTuple):
    """How scales are stored: "float" (fp32), "e8m0" or "e4m3", as `scales` has them."""

    kind: str = "float"
    rule: str = "floor"
    """Of e8m0: "floor" or "up". Of e4m3: "four_six" as `four_six` has it; "ms_eden" leaves the room that `eden`
    needs; any other as `scales` does."""


E_co = TypeVar("E_co", bound=Integers | Minifloat | CodeMap, covariant=True)


class Format(NamedTuple, Generic[E_co]):
    """How a tensor is quantized."""

    elements: E_co
    group: Group
    scale: ScaleCodec = ScaleCodec()


def named_format(
    name: str, granularity: str = "block", block_size: int = 0, *, block_rows: int = 1, scale_rule: str = "floor"
) -> Format[Integers | Minifloat]:
    """One of `base.number_formats.FORMATS`.

    granularity, block_size: for those whose blocks are not fixed. block_rows: 16 for tiles of 16 x 16 in nvfp4.
    """
    named = FORMATS[name]
    elements = Integers(named.bits) if named.elements == "integer" else MINIFLOATS[named.elements]
    size = named.block_size or block_size
    group = Group("block" if named.block_size else granularity, size or 128, block_rows)
    return Format(elements, group, ScaleCodec(named.scale, scale_rule))


def quantize_to(
    x: Tensor, fmt: Format[Integers | Minifloat], *, rounding: str = "nearest", key: Tensor | None = None
) -> Quantized:
    """Codes and scales of `x`, fp32, bf16 or fp16, of any shape. key: for rounding "stochastic".

    In floating point, code = encode(x / scale). What `integer.quantize` says of zeros, of Inf and NaN, of draws and
    of compiled code holds for all formats, with the scales of `scales`.

    States of optimizers go through `blockwise.quantize_blockwise`. Raises ValueError as `integer.quantize` does.
    """
    elements, group, scale_codec = fmt
    if isinstance(elements, Integers) and scale_codec.kind == "float":
        return quantize(
            x,
            elements.bits,
            granularity=group.granularity,
            block_size=group.block_size,
            symmetric=elements.symmetric,
            rounding=rounding,
            key=key,
            full_range=elements.full_range,
        )
    check_arguments(x, elements.bits, group.granularity, group.block_size, rounding, key)
    x = x.detach().float()
    absmax = reduce_groups(x.abs(), torch.amax, group.granularity, group.block_size)
    scale = scale_of(x, absmax, fmt)
    return quantized_as(fmt, codes_by(x, scale, fmt, key), scale)


def codes_by(x: Tensor, scale: Tensor, fmt: Format[Integers | Minifloat], key: Tensor | None) -> Tensor:
    """Codes of x, fp32, bf16 or fp16, by scales that are known, of no asymmetric range: int8 of integers, else uint8.

    key: of stochastic rounding; None: to nearest.
    """
    elements, group, _ = fmt
    x = x.float()
    steps = in_steps(x, expand_groups(scale, x, group.granularity, group.block_size))
    if isinstance(elements, Integers):
        return round_steps(steps, key).clamp(*elements.code_range).to(torch.int8)
    return encode(steps, elements, None if key is None else uniform(key, steps.shape, steps.device))


def quantized_as(fmt: Format[Integers | Minifloat], codes: Tensor, scale: Tensor) -> Quantized:
    """Codes and scales that were found as `quantize_to` finds them."""
    name = {} if isinstance(fmt.elements, Integers) else {"elements": fmt.elements.name}
    return Quantized(codes, scale, None, fmt.group.granularity, fmt.group.block_size, **name)


def scale_of(x: Tensor, absmax: Tensor, fmt: Format[Integers | Minifloat]) -> Tensor:
    """fp32 of absmax's shape: the scales of groups of x, fp32, bf16 or fp16, by their largest magnitudes, NaN where
    there is one.

    Not of asymmetric codes nor of the full range, which `integer` has.
    """
    elements, group, codec = fmt
    if group.block_rows > 1:
        absmax = _over_rows(absmax, group.block_rows)
    if codec.kind == "e4m3":
        return times_tensor(*e4m3_parts(x, absmax, fmt), absmax)
    return _scale(absmax, elements, codec)


def e4m3_parts(x: Tensor, absmax: Tensor, fmt: Format[Integers | Minifloat]) -> tuple[Tensor, Tensor]:
    """(block, tensor) of e4m3 scales: values of e4m3 in absmax's shape, and fp32 of no dimension.

    x and absmax as `scale_of` takes them, where tiles have one maximum. Blocks of zeros, and those with an Inf or a
    NaN, have some value.
    """
    elements, group, codec = fmt
    if codec.rule == FOUR_SIX:
        return four_six_parts(x.float(), absmax, group.block_size, group.block_rows)
    room = [LARGEST_WITH_ROOM] if codec.rule == MS_EDEN else []
    return parts_by_largest(absmax, largest_value(elements), *room)


def fake_quantize_to(
    x: Tensor, fmt: Format[Integers | Minifloat], *, rounding: str = "nearest", key: Tensor | None = None
) -> Tensor:
    """What is left of `x`, in its own shape and dtype. No gradient flows."""
    return dequantize(quantize_to(x, fmt, rounding=rounding, key=key), x.dtype)


def largest_value(elements: Integers | Minifloat) -> float:
    """In units of the scale."""
    if isinstance(elements, Integers):
        return float(elements.levels)
    return elements.largest


def _scale(absmax: Tensor, elements: Integers | Minifloat, codec: ScaleCodec) -> Tensor:
    largest = largest_value(elements)
    if codec.kind == "e8m0":
        implied = elements.bits - 2 if isinstance(elements, Integers) else 0
        return e8m0_scale(absmax, largest, codec.rule, implied=implied)
    return symmetric_scale(absmax, largest)


def _over_rows(absmax: Tensor, rows: int) -> Tensor:
    """The largest of each `rows` rows of blocks [..., num_rows, num_blocks], for each of them."""
    if absmax.dim() < 2 or not absmax.numel():
        return absmax
    flat = absmax.reshape(-1, absmax.shape[-1])
    padded = torch.nn.functional.pad(flat, (0, 0, 0, -flat.shape[0] % rows))
    largest = padded.unflatten(0, (-1, rows)).amax(1)
    return largest.repeat_interleave(rows, 0)[: flat.shape[0]].reshape(absmax.shape)
