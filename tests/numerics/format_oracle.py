"""Formats in floating point and with scales of 8 bits once more, slow and for reading: tables, and Python numbers.

Shares no code with the implementation.
"""

import functools
import math

import numpy as np
from numerics import oracle

# Exponent bits, mantissa bits, the code after the last finite one of a sign.
KINDS = {"e4m3": (4, 3, 0x7F), "e5m2": (5, 2, 0x7C), "e2m3": (2, 3, 0x20), "e3m2": (3, 2, 0x20), "e2m1": (2, 1, 0x08)}

# Elements, scale, block: written out again.
FORMATS = {
    "fp8_e4m3": ("e4m3", "float", None),
    "fp8_e5m2": ("e5m2", "float", None),
    "fp6_e2m3": ("e2m3", "float", None),
    "fp6_e3m2": ("e3m2", "float", None),
    "fp4_e2m1": ("e2m1", "float", None),
    "mxfp8": ("e4m3", "e8m0", 32),
    "mxfp6": ("e2m3", "e8m0", 32),
    "mxfp4": ("e2m1", "e8m0", 32),
    "mxint8": (8, "e8m0", 32),
    "nvfp4": ("e2m1", "e4m3", 16),
    "nvint4": (4, "e4m3", 16),
}


def value_of(code, kind):
    """Of a code without its sign, by the formula of the specification."""
    exponent_bits, mantissa_bits, _ = KINDS[kind]
    bias = 2 ** (exponent_bits - 1) - 1
    field, mantissa = divmod(code, 2**mantissa_bits)
    if field == 0:
        return mantissa / 2**mantissa_bits * 2.0 ** (1 - bias)
    return (1 + mantissa / 2**mantissa_bits) * 2.0 ** (field - bias)


@functools.cache
def table(elements):
    """The values from 0 on, float64."""
    if isinstance(elements, int):
        return np.arange(2 ** (elements - 1), dtype=np.float64)
    return np.array([value_of(code, elements) for code in range(KINDS[elements][2])])


def round_to(v, elements, draws=None):
    """The element of each v, float32: (its number in the table, its sign as +1 or -1)."""
    values = table(elements)
    magnitude = np.minimum(np.abs(v.astype(np.float64)), values[-1])
    above = np.searchsorted(values, magnitude)  # values[above - 1] < magnitude <= values[above]
    below = np.where(values[above] == magnitude, above, above - 1)
    low, high = values[below], values[above]
    if draws is None:
        nearer_high = (magnitude - low > high - magnitude) | ((magnitude - low == high - magnitude) & (above % 2 == 0))
    else:
        share = np.where(high > low, (magnitude - low) / np.where(high > low, high - low, 1), 0)
        # Up is to the larger number, whatever the sign.
        nearer_high = np.where(v < 0, draws >= 1 - share, draws < share) & (high > low)
    return np.where(nearer_high, above, below), np.where(np.signbit(v), -1.0, 1.0)


def block_scale(absmax, elements, kind, rule, tensor, largest=None):
    """float32, of a block with this largest magnitude, which becomes `largest`."""
    largest = table(elements)[-1] if largest is None else largest
    if not np.isfinite(absmax):
        return np.float32("nan")
    if kind == "float":
        return oracle.step_size(np.float32(absmax), np.float32(largest))
    if kind == "e4m3":
        if not absmax > 0:
            return np.float32(0)
        return e4m3_block(absmax, largest, tensor) * tensor
    implied = elements - 2 if isinstance(elements, int) else 0
    largest = largest / 2**implied
    if absmax == 0:
        shared = -127
    else:
        shared = math.frexp(float(absmax))[1] - 1 - (math.frexp(largest)[1] - 1)
        if rule == "up" and float(absmax) > largest * 2.0**shared:
            shared += 1
    return np.float32(2.0 ** (min(max(shared, -127), 127) - implied))


def four_six(flat, members, largest, elements, tensor, shape, rows):
    """The scale of each block: that one of two with the smaller error over the block, or over all of its tile.

    All in float32, in the order that the definition states: errors of the two may be as good as equal.
    """
    pairs, errors, ratios = [], [], []
    for absmax, indices in zip(largest, members, strict=True):
        pairs.append([block_scale(absmax, elements, "e4m3", "", tensor, most) for most in (6.0, 4.0)])
        six, four = (e4m3_block(absmax, most, tensor) for most in (6.0, 4.0))
        ratios.append(four / six)
        off = []
        for scale in pairs[-1]:
            v = flat[indices] / scale if scale > 0 else np.zeros(len(indices), np.float32)
            number, sign = round_to(v, elements)
            difference = (table(elements)[number] * sign).astype(np.float32) - v
            squares = np.zeros(16, np.float32)
            squares[: len(indices)] = difference * difference
            off.append(halved(squares))
        errors.append(off)
    errors = np.array(errors, np.float32).reshape(shape[0], -1, 2)
    for first in range(0, shape[0], rows):
        tile = np.zeros((rows, *errors.shape[1:]), np.float32)
        tile[: len(errors[first : first + rows])] = errors[first : first + rows]
        errors[first : first + rows] = halved(tile)
    errors = errors.reshape(-1, 2)
    return [
        pair[int(four * (ratio * ratio) < six)] for pair, (six, four), ratio in zip(pairs, errors, ratios, strict=True)
    ]


def e4m3_block(absmax, largest, tensor):
    """The part of a block's scale that is stored in E4M3, float32: 2^-9 for a block of zeros or without an end."""
    if not (np.isfinite(absmax) and absmax > 0):
        return np.float32(2.0**-9)
    in_units = np.float32(absmax) / np.float32(largest) / tensor
    number, _ = round_to(np.maximum(in_units, np.float32(2.0**-9))[None], "e4m3")
    return np.float32(table("e4m3")[number[0]])


def halved(values):
    """The sum over the first dimension, a power of two: halves are added until one is left."""
    while len(values) > 1:
        values = values[: len(values) // 2] + values[len(values) // 2 :]
    return values[0]


def quantize(x, name, *, granularity="block", block_size=128, rows=1, rule="floor", key=None):
    """(values in units of their scale, scale of each element), float32 arrays of x's shape. x: [rows, features]."""
    elements, kind, fixed = FORMATS[name]
    if fixed:
        granularity, block_size = "block", fixed
    flat = x.reshape(-1)
    _, members = oracle.groups(x.shape, granularity, block_size)
    draws = None if key is None else oracle.uniform(key, flat.size)
    with np.errstate(all="ignore"):
        largest = [np.abs(flat[indices]).max(initial=np.float32(0)) for indices in members]
        if rows > 1:
            blocks = np.array(largest).reshape(x.shape[0], -1)
            for first in range(0, x.shape[0], rows):
                blocks[first : first + rows] = blocks[first : first + rows].max(0)
            largest = list(blocks.reshape(-1))
        finite = [value for value in largest if np.isfinite(value)]
        levels = np.float32((256 if rule in ("four_six", "ms_eden") else 448) * table(elements)[-1])
        tensor = oracle.step_size(np.float32(max(finite, default=0)), levels)
        chosen_scales = None
        if rule == "four_six":
            chosen_scales = four_six(flat, members, largest, elements, tensor, x.shape, rows)
        steps, scales = np.zeros(flat.size, np.float32), np.zeros(flat.size, np.float32)
        for number, (absmax, indices) in enumerate(zip(largest, members, strict=True)):
            scale = chosen_scales[number] if chosen_scales else block_scale(absmax, elements, kind, rule, tensor)
            scales[indices] = scale
            if scale > 0:
                v = flat[indices] / scale
                if isinstance(elements, int):
                    chosen = None if draws is None else draws[indices]
                    v = np.rint(v) if chosen is None else np.floor(v) + (chosen < v - np.floor(v))
                    steps[indices] = np.clip(v, -table(elements)[-1], table(elements)[-1])
                else:
                    number, sign = round_to(v, elements, None if draws is None else draws[indices])
                    steps[indices] = table(elements)[number] * sign
    return steps.reshape(x.shape), scales.reshape(x.shape)
