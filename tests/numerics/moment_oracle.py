"""The definitions of ds_quant.numerics.codes and blockwise once more, slow and for reading: scans over all codes.

Shares no code with the implementation.
"""

import functools
from fractions import Fraction

import numpy as np
from numerics import oracle

F = np.float32


def powers(counts, levels, exponent):
    result = []
    for count in counts:
        t = F(count) * (F(1) / F(levels))
        for _ in range({1: 0, 2: 1, 4: 2, 8: 3}[exponent]):
            t = t * t
        result.append(t)
    return result


@functools.cache
def magnitudes(name, bits, signed):
    """Values of the codes 0, 1, ... of a power or linear map."""
    if signed:
        top = 127 if bits == 8 else 7
        return powers(range(top + 1), top, {"linear": 1, "power": 4 if bits == 8 else 2}[name])
    if bits == 8:
        return powers(range(256), 255, {"linear": 1, "power": 8}[name])
    return powers(range(1, 17), 16, 1) if name == "linear" else powers(range(3, 19), 18, 8)


@functools.cache
def dynamic(bits, signed):
    """Values of the dynamic map, smallest first."""
    sign_bits = 1 if signed else 0
    exponents = 7 if bits == 8 else 3
    values = {0.0, 1.0} if bits == 8 or signed else {1.0}
    for zeros in range(exponents):
        # After a sign, `zeros` zeros and the indicator bit, what is left of the bits cuts the decade.
        fraction_bits = bits - sign_bits - zeros - 1
        edges = np.linspace(0.1, 1, 2**fraction_bits + 1)
        for middle in (edges[1:] + edges[:-1]) / 2 * 10.0**-zeros:
            values |= {middle, -middle} if signed else {middle}
    return [F(value) for value in sorted(values)]


@functools.cache
def floats(signed):
    """Magnitudes of the float map, smallest first: numbers of three bits of mantissa, up to 1."""
    numbers = [*sorted((1 + k / 8) * 2.0**-exponent for exponent in range(1, 34) for k in range(8)), 1.0]
    return [F(0), *(F(number) for number in numbers[-127:])] if signed else [F(number) for number in numbers[-256:]]


def encode_float(x, values, draw):
    """As encode_one; a draw, a multiple of 2^-16, is added to the fraction of the gap, and what is below it cut off."""
    if draw is None or x < values[0] or (values[0] == 0 and x < values[1]):
        return encode_one(x, values, draw)
    low = max(index for index, value in enumerate(values) if value <= x)
    if low == len(values) - 1:
        return low
    fraction = Fraction(float(x - values[low])) / Fraction(float(values[low + 1] - values[low]))
    return low + int(Fraction(int(draw * 65536), 65536) + fraction >= 1)


def encode_one(x, values, draw):
    """Index of the value that `x` is rounded to."""
    below = [index for index, value in enumerate(values) if value <= x]
    low = min(below[-1] if below else 0, len(values) - 2)
    gap, rest = values[low + 1] - values[low], x - values[low]
    if draw is None:
        return low + int(rest > values[low + 1] - x)
    return low + int(draw * gap < rest)


def encode(x, name, bits, signed, draws=None):
    """Integer codes and their values for each float32 of `x`, in units of the scale."""
    codes, decoded = [], []
    for index, value in enumerate(x):
        draw = None if draws is None else draws[index]
        if name == "dynamic":
            values = dynamic(bits, signed)
            code = encode_one(min(max(value, values[0]), F(1)), values, draw)
            codes.append(code)
            decoded.append(values[code])
            continue
        if name == "float":
            values = floats(signed)
            magnitude = min(abs(value) if signed else max(value, F(0)), F(1))
            code = encode_float(magnitude, values, draw)
            negative = signed and np.signbit(value)
            codes.append(code + 128 * int(negative))
            decoded.append(-values[code] if negative else values[code])
            continue
        values = magnitudes(name, bits, signed)
        negative = signed and value < 0
        magnitude = min(abs(value) if signed else max(value, F(0)), F(1))
        code = encode_one(magnitude, values, draw)
        codes.append(-code if negative else code)
        decoded.append(-values[code] if negative and code else values[code])
    return codes, decoded


def log_values(high, low):
    """Values of the codes of a block of the map log with these scales, in units of `high`, smallest first."""
    quotient = low * (F(1) / high)
    root = quotient
    for _ in range(5):
        root = np.sqrt(root)
    gap = (F(1) - root) * F(1 / 15)
    values = []
    for count in range(1, 15):
        value = root + F(count) * gap
        for _ in range(5):
            value = value * value
        values.append(value)
    return [quotient, *values, F(1)]


def quantize_log(x, block_size, key=None, offset=0):
    """(codes, scales, values) of the 1-D float32 array `x` with the map log: two scales to a block."""
    codes, scales, values = [], [], []
    with np.errstate(all="ignore"):
        for start in range(0, len(x), block_size):
            block = x[start : start + block_size]
            high = np.max(np.abs(block)) if np.all(np.isfinite(block)) else F("nan")
            if not high >= F(2.0**-126):
                special = high if np.isnan(high) else F(0)
                codes += [0] * len(block)
                scales += [special, special]
                values += [special] * len(block)
                continue
            low = max(min(np.min(block), high * F(0.5)), high * F(2.0**-30)) + F(0)
            table = log_values(high, low)
            for index, element in enumerate(block):
                draw = None if key is None else draw16(key, offset + start + index)
                code = encode_one(max(element * (F(1) / high), F(0)), table, draw)
                codes.append(code)
                values.append(low if code == 0 else table[code] * high)
            scales += [high, low]
    return codes, np.array(scales, dtype=F), np.array(values, dtype=F)


def draw16(key, index):
    run, place = divmod(index, 32)
    word = oracle.bits(key, 16 * run + place % 16)
    return F(word % 2**16 if place < 16 else word // 2**16) / F(2**16)


def quantize(x, name, bits, signed, block_size, key=None, offset=0):
    """(codes, scales, values) of the 1-D float32 array `x`."""
    codes, scales, values = [], [], []
    with np.errstate(all="ignore"):
        for start in range(0, len(x), block_size):
            block = x[start : start + block_size]
            finite = bool(np.all(np.isfinite(block)))
            scale = np.max(np.abs(block)) if finite else F("nan")
            if scale < F(2.0**-126):
                scale = F(0)
            steps = block * (F(1) / scale) if scale > 0 else np.zeros_like(block)
            draws = None
            if key is not None:
                draws = [draw16(key, offset + start + i) for i in range(len(block))]
            block_codes, decoded = encode(steps, name, bits, signed, draws)
            codes += block_codes
            values += [value * scale for value in decoded]
            scales.append(scale)
    return codes, np.array(scales, dtype=F), np.array(values, dtype=F)


def pack(codes, block_size):
    """Bytes of 4-bit codes."""
    packed = []
    for start in range(0, len(codes), block_size):
        block = codes[start : start + block_size]
        width = -(-len(block) // 2)
        for j in range(width):
            high = block[j + width] % 16 if j + width < len(block) else 0
            packed.append(block[j] % 16 + 16 * high)
    return packed
