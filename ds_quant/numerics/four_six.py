"""Which of two scales a block of NVFP4 takes: Four Over Six (arXiv 2512.02010).

e2m1 has no value between 4 and 6, so that a block whose largest magnitude becomes 6 rounds what lies between coarsely.
Each block is rounded to nearest with both scales, in fp32,

    tensor    max(absmax) / (256 * 6)
    block_6   absmax / 6 / tensor, rounded to e4m3, at least 2^-9      block_4   absmax / 4 / tensor, likewise
    error_s   the sum over the block of (decode(encode(x / scale_s)) - x / scale_s)^2, times (block_s / block_6)^2

and takes block_4 * tensor where error_4 < error_6, else block_6 * tensor. 256, where `scales` has 448, leaves room for
blocks that are larger by half. Sums are pairwise: halves of a block are added until one element is left, then rows of a
tile. Rounding stochastically changes the codes, and not the choice.

It costs two more roundings of each element. Zeros, Inf and NaN are as in `scales`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_quant.numerics.integer import divide, divide_to_fit, expand_groups, in_steps
from ds_quant.numerics.minifloat import E2M1, decode, encode
from ds_quant.numerics.scales import LARGEST_WITH_ROOM, e4m3_blocks, largest_finite, times_tensor


def four_six_parts(x: Tensor, absmax: Tensor, block_size: int, block_rows: int) -> tuple[Tensor, Tensor]:
    """(block, tensor) of x [..., features], fp32: fp32 of absmax's shape, [..., num_blocks], equal in all rows of a
    tile, and fp32 of no dimension."""
    tensor = divide_to_fit(largest_finite(absmax), LARGEST_WITH_ROOM * E2M1.largest)
    blocks = [e4m3_blocks(absmax, largest, tensor) for largest in (E2M1.largest, 4.0)]
    scales = [times_tensor(block, tensor, absmax) for block in blocks]
    errors = [_errors(x, scale, block_size, block_rows) for scale in scales]
    ratio = divide(blocks[1], blocks[0])  # NaN of zeros, which are no better with either
    return torch.where(errors[1] * (ratio * ratio) < errors[0], blocks[1], blocks[0]), tensor


def _errors(x: Tensor, scale: Tensor, block_size: int, block_rows: int) -> Tensor:
    """Sums of squares in units of the scale, of its shape."""
    steps = in_steps(x, expand_groups(scale, x, "block", block_size))
    off = decode(encode(steps, E2M1), E2M1) - steps
    flat = off.reshape(1) if off.dim() == 0 else off
    squares = F.pad(flat * flat, (0, -flat.shape[-1] % block_size)).unflatten(-1, (-1, block_size))
    sums = pairwise(squares, -1)
    if block_rows == 1 or sums.dim() < 2 or not sums.numel():
        return sums
    rows = sums.reshape(-1, sums.shape[-1])
    tiles = F.pad(rows, (0, 0, 0, -rows.shape[0] % block_rows)).unflatten(0, (-1, block_rows))
    return pairwise(tiles, 1).repeat_interleave(block_rows, 0)[: rows.shape[0]].reshape(sums.shape)


def pairwise(x: Tensor, dim: int) -> Tensor:
    """The sum over a dimension whose size is a power of two."""
    while (size := x.shape[dim]) > 1:
        x = x.narrow(dim, 0, size // 2) + x.narrow(dim, size // 2, size // 2)
    return x.squeeze(dim)
