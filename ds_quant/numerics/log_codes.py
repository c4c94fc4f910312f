"""4-bit codes between the two ends of their block: the map `log` of second moments.

A block has two scales: `high`, its largest value, and `low`, its smallest, but at least 2^-30 and at most a half of
`high`. The sixteen codes are spaced evenly between the 32nd roots of both, which is nearly evenly in their logarithm:
they cover what values the block has, be that a factor of two or of a million. In units of `high`, all in fp32, each
operation rounded to nearest:

    q = fl(low * fl(1 / high))        root = q, and five times its square root        gap = fl((1 - root) * fl(1 / 15))
    value(0) = q        value(15) = 1        value(c) = root + fl(c * gap), and five times its square

    encode(x): low is the last code with value(low) <= x, but at most 14; else as `codes` has it

A decoded value is value(c) * high, but `low` itself for code 0. So the ends of a block come back as they are, and what
was dequantized and is quantized again to nearest gets its codes and scales back. Zeros in a block that has other values
come back as its lowest value, never as zeros. docs/results has what these codes gain over those of one scale.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ds_quant.numerics.integer import divide, goes_up, nearest_sqrt

NAME = "log"
SCALES = 2
"""To a block: high and low follow each other."""
HIGHEST = 15
SQUARINGS = 5
LEAST = 2.0**-30
"""Of low / high. Moments that have fallen further, or are 0, would take the codes away from all others."""


class Spacing(NamedTuple):
    """Where the values of a block lie, in units of `high`: tensors of one shape."""

    quotient: Tensor
    root: Tensor
    gap: Tensor

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Spacing":
        return Spacing(*map(change, self))

    def value(self, count: Tensor) -> Tensor:
        """value(c) of fp32 counts."""
        value = self.root + count * self.gap
        for _ in range(SQUARINGS):
            value = value.square()
        return torch.where(count <= 0, self.quotient, torch.where(count >= HIGHEST, 1.0, value))


def low_end(least: Tensor, high: Tensor) -> Tensor:
    """`low` of blocks by their smallest values and `high`; `high` itself where that is 0 or NaN."""
    low = torch.maximum(torch.minimum(least, high * 0.5), high * LEAST) + 0.0  # of two zeros, the positive one
    return torch.where(high > 0, low, high)


def spacing(high: Tensor, low: Tensor) -> Spacing:
    """That of blocks with these scales. The quotient is 0 where `high` is 0 or NaN."""
    inverse = torch.where(high > 0, divide(torch.ones_like(high), high), 0.0)
    quotient = torch.where(inverse > 0, low * inverse, 0.0)
    root = _root(quotient)
    return Spacing(quotient, root, (1.0 - root) * (1.0 / HIGHEST))


def encode(x: Tensor, by_element: Spacing, draws: Tensor | None) -> Tensor:
    """uint8 codes of fp32 `x` in units of `high`; to nearest without draws from [0, 1)."""
    x = x.clamp(min=0.0)
    # The root is off by some ulp, and codes are far apart: the guess is off by one at most.
    guess = torch.floor((_root(x) - by_element.root) / by_element.gap).clamp(0.0, HIGHEST - 1.0)
    guess = guess - (by_element.value(guess) > x).float()
    guess = guess + (by_element.value(guess + 1) <= x).float()
    low = guess.clamp(0.0, HIGHEST - 1.0)
    return (low + goes_up(x, by_element.value(low), by_element.value(low + 1), draws)).to(torch.uint8)


def decode(codes: Tensor, high: Tensor, low: Tensor, by_element: Spacing) -> Tensor:
    """fp32 values of codes of any integer dtype, by each element's scales."""
    return torch.where(codes == 0, low, by_element.value(codes.to(torch.float32)) * high)


def _root(x: Tensor) -> Tensor:
    for _ in range(SQUARINGS):
        x = nearest_sqrt(x)
    return x
