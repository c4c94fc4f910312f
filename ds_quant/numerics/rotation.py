"""Randomized Hadamard rotation of blocks: spreads an outlier over its block before it is quantized.

A 1-D tensor is cut into blocks of `block_size` from its first element, the last may be shorter. In fp32, for a block t
of m elements, m a power of two:

    rotated(t) = H(signs * t)                  original(y) = signs * H(y)

    signs[i] = -1 where the top bit of bits(SIGN_KEY, i) is 1, else +1, i the index in the block (see `random`): the
               same for all blocks, ranks and steps
    H          the Walsh-Hadamard butterflies for h = 1, 2, 4, ... m / 2, each of which takes all pairs a, b that are h
               apart in runs of 2 h elements to a + b, a - b; then the product with 1 / sqrt(m) rounded to fp32

`rotate_rows` also takes the key of a rotation of its own, whose signs are drawn for each index i of a row, and not of a
block: -1 where the top bit of bits(key, i) is 1.

A last block whose length is no power of two is cut into its binary parts, the largest first: 13 elements are 8, 4 and
1. Each part has an H of its own; signs go by the index in the block.

A matrix [rows, features] is rotated row by row: each row as that 1-D tensor.

H is its own inverse, up to rounding. An Inf or a NaN reaches the whole of its part, and large numbers may overflow.
"""

import math

import torch
from torch import Tensor

from ds_quant.numerics.random import bits_at, random_bits

SIGN_KEY = (0x48616461, 0x6D617264)
""""Hada", "mard"."""


def rotate(t: Tensor, block_size: int) -> Tensor:
    """The fp32 tensor `t`, [numel], rotated block by block, as the module docstring defines it."""
    return rotate_rows(t[None], block_size)[0]


def rotate_rows(x: Tensor, block_size: int, key: Tensor | None = None) -> Tensor:
    """The fp32 matrix `x`, [rows, features], each of its rows rotated, with the signs of `key` where there is one."""
    return _transform(x * row_signs(x.shape[-1], block_size, key, x.device), block_size)


def row_signs(features: int, block_size: int, key: Tensor | None, device: torch.device) -> Tensor:
    """fp32 +1 and -1, [features]: those of `rotate_rows`."""
    if key is None:
        return signs_of(features, block_size, device)
    return 1.0 - (random_bits(key, features, device) >> 31).float() * 2.0


def unrotate(y: Tensor, block_size: int) -> Tensor:
    """The inverse of `rotate`, up to rounding."""
    return _transform(y[None], block_size)[0] * signs_of(y.numel(), block_size, y.device)


def signs_of(numel: int, block_size: int, device: torch.device | str | None = None) -> Tensor:
    """fp32 +1 and -1 of shape [numel]."""
    index = torch.arange(numel, device=device) & (block_size - 1)
    return block_signs(block_size, device)[index]


def block_signs(block_size: int, device: torch.device | str | None = None) -> Tensor:
    """fp32 +1 and -1 of one block, [block_size]."""
    # No tensor is made of the key: the host would wait for its way to the device.
    bits = bits_at(SIGN_KEY, torch.arange(block_size, dtype=torch.int64, device=device))
    return 1.0 - (bits >> 31).float() * 2.0


def norm(length: int) -> float:
    """What H of `length` elements is multiplied with in the end, before it is rounded to fp32."""
    return 1.0 / math.sqrt(length)


def hadamard(rows: Tensor) -> Tensor:
    """H of each row of the fp32 tensor `rows`, [..., power of two]."""
    length = rows.shape[-1]
    h = 1
    while h < length:
        a, b = rows.unflatten(-1, (length // (2 * h), 2, h)).unbind(-2)
        rows = torch.stack((a + b, a - b), dim=-2).flatten(-3)
        h *= 2
    return rows * norm(length)


def _transform(x: Tensor, block_size: int) -> Tensor:
    features = x.shape[-1]
    covered = features // block_size * block_size
    parts = [hadamard(x[:, :covered].unflatten(-1, (-1, block_size))).flatten(1)] if covered else []
    part = block_size
    while part := part // 2:
        if (features - covered) & part:
            parts.append(hadamard(x[:, covered : covered + part]))
            covered += part
    return torch.cat(parts, dim=-1) if parts else x
