"""A format: what a quantized tensor is made of, whichever part of training it belongs to.

    Format    =  elements                      +  group
                 how a value in units of its      which elements share a scale
                 scale becomes a code

Elements are `Integers`, evenly spaced (operands of linear layers, gradients on the wire; defined in `integer`), or a
`CodeMap` (states of optimizers; defined in `codes` and `blockwise`). They say what the scale is, too: the largest
magnitude over the levels of integers, the largest magnitude itself for a map. Scales are fp32.

Linear layers, moments and messages each hold a Format, so that one that is added here is there for all.
"""

from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ds_quant.numerics import blockwise, integer
from ds_quant.numerics.blockwise import QuantizedBlocks
from ds_quant.numerics.codes import CodeMap
from ds_quant.numerics.integer import Quantized


class Integers(NamedTuple):
    """Evenly spaced values, as `integer` has them."""

    bits: int
    symmetric: bool = True
    full_range: bool = False
    """All 2^bits codes of a symmetric range."""

    @property
    def levels(self) -> float:
        """The scales that a group's largest magnitude takes, of symmetric ones."""
        return integer.symmetric_levels(self.bits, full_range=self.full_range)


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

    @property
    def bits(self) -> int:
        return self.elements.bits

    def quantize(
        self, x: Tensor, *, rounding: str = "nearest", key: Tensor | None = None
    ) -> Quantized | QuantizedBlocks:
        """Codes and scales of `x`, fp32, bf16 or fp16: a Quantized for Integers, QuantizedBlocks for a CodeMap.

        x: of any shape for Integers; 1-D for a CodeMap, whose groups are blocks. key: for rounding "stochastic".
        Raises ValueError as `integer.quantize` and `blockwise.quantize_blockwise` do.
        """
        if isinstance(self.elements, CodeMap):
            self._check_blocks()
            size = self.group.block_size
            return blockwise.quantize_blockwise(x, self.elements, block_size=size, rounding=rounding, key=key)
        return integer.quantize(
            x,
            self.elements.bits,
            granularity=self.group.granularity,
            block_size=self.group.block_size,
            symmetric=self.elements.symmetric,
            rounding=rounding,
            key=key,
            full_range=self.elements.full_range,
        )

    def _check_blocks(self) -> None:
        if self.group.granularity != "block":
            raise ValueError(
                f"Format.quantize: got granularity {self.group.granularity!r} with the map of a moment; allowed: block "
                "(see group_size); make it so"
            )


def dequantize(q: Quantized | QuantizedBlocks, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of what `Format.quantize` gave, rounded once to `dtype`."""
    if isinstance(q, QuantizedBlocks):
        return blockwise.dequantize_blockwise(q).to(dtype)
    return integer.dequantize(q, dtype)
