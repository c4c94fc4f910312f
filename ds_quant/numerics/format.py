"""A format: what a quantized tensor is made of, whichever part of training it belongs to.

    Format    =  elements                      +  group
                 how a value in units of its      which elements share a scale
                 scale becomes a code

Elements are `Integers`, evenly spaced (operands of linear layers, gradients on the wire; defined in `integer`), or a
`CodeMap` (states of optimizers; defined in `codes` and `blockwise`). They say what the scale is, too: the largest
magnitude over the levels of integers, the largest magnitude itself for a map. Scales are fp32.

Linear layers, states of optimizers and messages each hold a Format; `docs/extending.md` says what a new one touches.
"""

from typing import Generic, NamedTuple, TypeVar

from torch import Tensor

from ds_quant.numerics.codes import CodeMap
from ds_quant.numerics.integer import Quantized, quantize


class Integers(NamedTuple):
    """Evenly spaced values, as `integer` has them."""

    bits: int
    symmetric: bool = True
    full_range: bool = False
    """All 2^bits codes of a symmetric range."""


class Group(NamedTuple):
    """Which elements share a scale: "tensor", "row", "column" or "block", as `integer` has them."""

    granularity: str
    block_size: int = 128
    """Counts for "block" only."""


E = TypeVar("E", bound=Integers | CodeMap)


class Format(NamedTuple, Generic[E]):
    """How a tensor is quantized."""

    elements: E
    group: Group


def quantize_to(x: Tensor, fmt: Format[Integers], *, rounding: str = "nearest", key: Tensor | None = None) -> Quantized:
    """Codes and scales of `x`, fp32, bf16 or fp16, of any shape. key: for rounding "stochastic".

    States of optimizers go through `blockwise.quantize_blockwise`. Raises ValueError as `integer.quantize` does.
    """
    elements, group = fmt
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
