"""The definitions of ds_quant.numerics once more, slow and for reading: Python ints and numpy float32, group by group.

Shares no code with the implementation.
"""

import functools
import itertools
import math

import numpy as np

M = 2**32


def bits_of(x):
    """int32 that tell all numbers apart and no NaN from another."""
    x = np.asarray(x, dtype=np.float32)
    return np.where(np.isnan(x), 0x7FC00000, x.view(np.int32))


def mix(x):
    x ^= x >> 16
    x = x * 0x21F0AAAD % M
    x ^= x >> 15
    x = x * 0x735A2D97 % M
    return x ^ (x >> 15)


def fold_key(seed, step=0, micro_step=0, rank=0, stream=0):
    first, second = 0x243F6A88, 0x85A308D3
    number = 0
    for counter in (seed, step, micro_step, rank, stream):
        for word in (counter % M, counter // M):
            first = mix((first + (number + 1) * 0x9E3779B9) % M ^ word)
            second = mix((second + (number + 1) * 0xC2B2AE35) % M ^ word)
            number += 1
    return first, second


def derive_key(key, stream):
    first, second = key
    for number, word in ((10, stream % M), (11, stream // M)):
        first = mix((first + (number + 1) * 0x9E3779B9) % M ^ word)
        second = mix((second + (number + 1) * 0xC2B2AE35) % M ^ word)
    return first, second


def bits(key, index):
    inner = mix(index % M ^ key[0])
    return mix((inner + key[1] + index // M * 0x1E3779B1) % M)


def uniform(key, count):
    return np.array([(bits(key, i) >> 8) / 2**24 for i in range(count)], dtype=np.float32)


def groups(shape, granularity, block_size):
    """(shape of the scale, [row-major element indices of each group, in the order of the scales])."""
    return _groups(tuple(shape), granularity, block_size)


@functools.lru_cache(maxsize=256)
def _groups(shape, granularity, block_size):
    scale_shape, members = _listed_groups(shape, granularity, block_size)
    return scale_shape, [np.array(indices, dtype=np.int64) for indices in members]


def _listed_groups(shape, granularity, block_size):
    features = shape[-1] if shape else 1
    leading = tuple(shape[:-1])
    rows = math.prod(leading)
    elements = [[row * features + feature for feature in range(features)] for row in range(rows)]
    if granularity == "tensor":
        return (), [list(itertools.chain(*elements))]
    if granularity == "row":
        return ((*leading, 1) if shape else ()), elements
    if granularity == "column":
        return ((features,) if shape else ()), [[row[feature] for row in elements] for feature in range(features)]
    starts = range(0, features, block_size)
    blocks = [row[start : start + block_size] for row in elements for start in starts]
    return (*leading, len(starts)), blocks


def step_size(extent, levels):
    """float32 extent / levels; a denormal one is moved up where it does not cover the extent."""
    scale = extent / np.float32(levels)
    if scale < np.float32(2.0**-126) and scale * np.float32(levels) < extent:
        scale = np.nextafter(scale, np.float32(1))
    return scale


def group_scale(x, bit_width, symmetric, full_range=False):
    """(scale, zero point) of the float32 values of one group."""
    if len(x) == 0:
        return np.float32(0), np.float32(0)
    if not np.all(np.isfinite(x)):
        return np.float32("nan"), np.float32(0)
    if symmetric:
        most = (2**bit_width - 1) / 2 if full_range else 2 ** (bit_width - 1) - 1
        return step_size(np.max(np.abs(x)), most), np.float32(0)
    low, high = np.min(x), np.max(x)
    levels = 2**bit_width - 1
    if low == high:
        scale = np.abs(high)
    elif np.isinf(high - low):
        scale = (high / np.float32(2) - low / np.float32(2)) / np.float32(levels) * np.float32(2)
    else:
        scale = step_size(high - low, levels)
    zero_point = np.rint(-low / scale) if scale > 0 else np.float32(0)
    return scale, zero_point


def quantize(x, bit_width, *, granularity, block_size, symmetric, key=None, full_range=False):
    """(codes, scale, zero_point) of the float32 array `x`; `key`, a pair of ints, makes the rounding stochastic."""
    flat = x.reshape(-1)
    scale_shape, members = groups(x.shape, granularity, block_size)
    draws = None if key is None else uniform(key, flat.size)
    codes = np.zeros(flat.size, dtype=np.int64)
    scales, zero_points = [], []
    lowest, highest = (-(2 ** (bit_width - 1)) + 1, 2 ** (bit_width - 1) - 1) if symmetric else (0, 2**bit_width - 1)
    lowest -= full_range
    with np.errstate(all="ignore"):
        for indices in members:
            values = flat[indices]
            scale, zero_point = group_scale(values, bit_width, symmetric, full_range)
            scales.append(scale)
            zero_points.append(zero_point)
            if not scale > 0:
                continue
            steps = values / scale
            assert steps.dtype == np.float32
            if draws is None:
                steps = np.rint(steps)
            else:
                floor = np.floor(steps)
                steps = np.where(draws[indices] < steps - floor, floor + np.float32(1), floor)
            codes[indices] = np.clip(steps + zero_point, lowest, highest).astype(np.int64)
    scale = np.array(scales, dtype=np.float32).reshape(scale_shape)
    zero_point = np.array(zero_points, dtype=np.float32).reshape(scale_shape)
    return codes.reshape(x.shape), scale, zero_point


def expand(per_group, shape, granularity, block_size):
    """A scale or zero point, one for each element."""
    _, members = groups(shape, granularity, block_size)
    flat = np.zeros(math.prod(shape), dtype=np.float32)
    for value, indices in zip(per_group.reshape(-1), members, strict=True):
        flat[indices] = value
    return flat.reshape(shape)


def dequantize(codes, scale, zero_point, *, granularity, block_size):
    """float32 values, before they are brought back to what the dtype can hold."""
    with np.errstate(all="ignore"):
        steps = codes.astype(np.float32) - expand(zero_point, codes.shape, granularity, block_size)
        return steps * expand(scale, codes.shape, granularity, block_size)
