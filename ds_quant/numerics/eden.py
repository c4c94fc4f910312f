"""MS-EDEN: codes rounded to nearest, with scales that make a rotated vector's estimate unbiased (arXiv 2601.22813).

Rounding to nearest loses less than half of what stochastic rounding does, and is biased. EDEN (arXiv 2108.08842) takes
the bias away after a random rotation: of each block y of a rotated vector, Q(y) its values to nearest,

    factor   <y, y> / <y, Q(y)>          1 where Q(y) is 0
    scale    factor * scale

so that <y, factor Q(y)> = <y, y>, whatever the signs of the rotation; what is left of the error is orthogonal to the
vector, and random signs turn it about: in the mean it falls to 0 as blocks of the rotation grow. fp32 scales take the
factor as it is. Scales in e4m3 are too coarse for factors near 1, and are rounded stochastically, which is one draw a
block in place of one an element:

    tensor   max(absmax) / (256 * largest), where `scales` has 448: factors of up to 1.75 do not saturate
    block    factor * (absmax / largest / tensor rounded to e4m3), rounded stochastically to e4m3

The mean over its draws is exact, up to 2^-24. What lies so far below the tensor's largest that all codes of its block
become 0 stays 0. Sums are fp32 and pairwise: halves of a block are added until one element is left. The paper clips the
largest magnitudes besides, which is not done here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_quant.numerics.four_six import pairwise
from ds_quant.numerics.integer import (
    Quantized,
    divide,
    divide_to_fit,
    expand_scale,
    in_steps,
    integer_values,
    reduce_groups,
)
from ds_quant.numerics.minifloat import E4M3, decode, encode
from ds_quant.numerics.random import uniform
from ds_quant.numerics.scales import LARGEST_WITH_ROOM, e4m3_blocks, largest_finite, times_tensor


def corrected(q: Quantized, x: Tensor, largest: float | None, key: Tensor) -> Quantized:
    """`q`, the blocks of x [rows, features] in fp32 to nearest, with scales by the rule of the module docstring.

    largest: the largest element where scales are e4m3, which took the scale of the tensor above; None: they are fp32.
    """
    factor = _factors(q, x)
    if largest is None:
        return q._replace(scale=q.scale * factor)
    absmax = reduce_groups(x.abs(), torch.amax, "block", q.block_size)
    tensor = divide_to_fit(largest_finite(absmax), LARGEST_WITH_ROOM * largest)
    block = e4m3_blocks(absmax, largest, tensor) * factor
    block = decode(encode(block, E4M3, uniform(key, block.shape, block.device)), E4M3)
    return q._replace(scale=times_tensor(block, tensor, absmax))


def _factors(q: Quantized, x: Tensor) -> Tensor:
    """fp32 of the shape of the scale."""
    steps = in_steps(x, expand_scale(q))
    num_more = -x.shape[-1] % q.block_size
    squares, products = (
        pairwise(F.pad(t, (0, num_more)).unflatten(-1, (-1, q.block_size)), -1)
        for t in (steps * steps, steps * integer_values(q))
    )
    return torch.where(products > 0, divide(squares, products), 1.0)
