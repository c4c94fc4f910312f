"""The definition of ds_quant.numerics.wire once more, slow and for reading: numpy float32, block by block.

Shares no code with the implementation. Also lays out messages for tests.
"""

import math

import numpy as np
from numerics import format_oracle, oracle

from ds_quant.numerics.wire import Parts, code_bytes, scale_bytes

SIGN_KEY = (0x48616461, 0x6D617264)
F = np.float32


def signs(length):
    return np.array([-1 if oracle.bits(SIGN_KEY, i) >> 31 else 1 for i in range(length)], dtype=F)


def hadamard(x):
    """H of a power of two of elements."""
    x, h = [F(value) for value in x], 1
    while h < len(x):
        for i in range(len(x)):
            if not i & h:
                x[i], x[i + h] = x[i] + x[i + h], x[i] - x[i + h]
        h *= 2
    return np.array([value * F(1 / np.sqrt(np.float64(len(x)))) for value in x], dtype=F)


def transform(block):
    parts, begin = [], 0
    for exponent in reversed(range(13)):
        if len(block) >> exponent & 1:
            parts.append(hadamard(block[begin : begin + 2**exponent]))
            begin += 2**exponent
    return np.concatenate(parts)


def by_block(function, x, block_size):
    return np.concatenate([function(x[i : i + block_size]) for i in range(0, len(x), block_size)])


def rotate(x, fmt):
    if fmt.rotation == "none":
        return x
    return by_block(lambda block: transform(block * signs(len(block))), x, fmt.block_size)


def unrotate(y, fmt):
    if fmt.rotation == "none":
        return y
    return by_block(lambda block: transform(block) * signs(len(block)), y, fmt.block_size)


def pack(codes, fmt):
    """The bytes of a piece's codes, a list of ints."""
    if fmt.bits == 8:
        return [int(code) % 256 for code in codes]
    packed = []
    for i in range(0, len(codes), fmt.block_size):
        block = [int(code) % 16 for code in codes[i : i + fmt.block_size]]
        half = (len(block) + 1) // 2
        packed += [low + 16 * high for low, high in zip(block[:half], [*block[half:], 0][:half], strict=True)]
    return packed


def unpack(packed, numel, fmt):
    """Values of the elements: fp32."""
    if fmt.bits == 8:
        return np.array([byte - 256 if byte > 127 else byte for byte in packed], dtype=F)
    codes, at = [], 0
    for i in range(0, numel, fmt.block_size):
        length = min(fmt.block_size, numel - i)
        half = (length + 1) // 2
        block = [byte % 16 for byte in packed[at : at + half]] + [byte // 16 for byte in packed[at : at + half]]
        codes += block[:length]
        at += half
    if is_floating(fmt):
        values = format_oracle.table("e2m1").astype(F)
        return np.array([-values[code - 8] if code > 7 else values[code] for code in codes], dtype=F)
    return np.array([code - 16 if code > 7 else code for code in codes], dtype=F)


def is_floating(fmt):
    return bool(fmt.format) and not isinstance(format_oracle.FORMATS[fmt.format][0], int)


def encode(y, fmt, key, stream):
    """(codes, bytes of the scales, values) of a piece that is rotated already."""
    subkey = None if key is None else oracle.derive_key(key, stream)
    shape = {"granularity": "block", "block_size": fmt.block_size}
    if not fmt.format:
        codes, scale, _ = oracle.quantize(y, fmt.bits, symmetric=True, key=subkey, **shape)
        return codes, scale.view(np.uint8), codes.astype(F) * oracle.expand(scale, y.shape, **shape)
    steps, scale = format_oracle.quantize(y[None], fmt.format, rule=fmt.scale_rule, key=subkey, **shape)
    scale = scale[0]
    # What is 0 in units of the scale loses its sign, a small number keeps its.
    steps = np.where(y / scale == 0, F(0), steps[0])
    codes = steps.astype(np.int64)
    if not is_floating(fmt):
        steps = codes.astype(F)  # which have no -0
    else:
        table = format_oracle.table("e2m1")
        codes = np.array([8 * np.signbit(v) + int(np.searchsorted(table, abs(v))) for v in steps])
    return codes, stored_scales(y, np.ascontiguousarray(scale[:: fmt.block_size]), fmt), steps * scale


def stored_scales(y, scale, fmt):
    """The bytes of scales, a float32 for each block, which may be NaN."""
    elements, kind, _ = format_oracle.FORMATS[fmt.format]
    if kind == "float":
        return scale.view(np.uint8)
    if kind == "e8m0":
        stored = [255 if np.isnan(value) else int(math.log2(value)) + 127 for value in scale]
        return np.array(stored, dtype=np.uint8)
    blocks = [y[i : i + fmt.block_size] for i in range(0, len(y), fmt.block_size)]
    absmax = [float(np.abs(block).max()) for block in blocks]
    most = format_oracle.table(elements)[-1]
    levels = F((256 if fmt.scale_rule == "four_six" else 448) * most)
    tensor = oracle.step_size(F(max((value for value in absmax if np.isfinite(value)), default=0)), levels)
    stored = []
    for value, of_block in zip(absmax, scale, strict=True):
        if not np.isfinite(value):
            stored.append(0x7F)
            continue
        parts = [format_oracle.e4m3_block(value, largest, tensor) for largest in (most, 4.0)]
        part = next(part for part in parts if part * tensor == of_block) if value else 0.0
        stored.append(int(np.searchsorted(format_oracle.table("e4m3"), part)))
    return np.concatenate((np.array([tensor], dtype=F).view(np.uint8), np.array(stored, dtype=np.uint8)))


def scales_from(stored, fmt):
    """A float32 for each block, from bytes."""
    kind = format_oracle.FORMATS[fmt.format][1] if fmt.format else "float"
    if kind == "float":
        return np.frombuffer(stored, dtype=F)
    if kind == "e8m0":
        return np.array([np.nan if byte == 255 else 2.0 ** (byte - 127) for byte in stored], dtype=F)
    table = [*format_oracle.table("e4m3"), np.nan]
    parts = np.array([-table[byte - 128] if byte > 127 else table[byte] for byte in stored[4:]], dtype=F)
    return parts * np.frombuffer(stored[:4], dtype=F)


def bytes_of_scales(numel, fmt):
    blocks = -(-numel // fmt.block_size)
    kind = format_oracle.FORMATS[fmt.format][1] if fmt.format else "float"
    return {"float": 4 * blocks, "e8m0": blocks, "e4m3": 4 + blocks}[kind]


def any_scales(rng, numel, fmt):
    """Bytes of scales such as messages have; a few of the blocks have 0 or NaN."""
    size = bytes_of_scales(numel, fmt)
    kind = format_oracle.FORMATS[fmt.format][1] if fmt.format else "float"
    if kind == "e8m0":
        stored = rng.integers(100, 130, size=size).astype(np.uint8)
        stored[rng.uniform(size=size) < 0.05] = rng.choice([0, 255])
        return stored
    if kind == "float":
        scales = 10.0 ** rng.uniform(-6, 0, size=size // 4)
        scales[rng.uniform(size=len(scales)) < 0.05] = rng.choice([0.0, np.nan])
        return scales.astype(F).view(np.uint8)
    tensor = np.array([10.0 ** rng.uniform(-6, 0)], dtype=F).view(np.uint8)
    return np.concatenate((tensor, rng.integers(128, size=size - 4).astype(np.uint8)))


def decode(message, scale_at, codes_at, numel, fmt):
    """The values of a piece, from a bytes object."""
    scale = scales_from(message[scale_at : scale_at + bytes_of_scales(numel, fmt)], fmt)
    count = (
        numel
        if fmt.bits == 8
        else sum((min(fmt.block_size, numel - i) + 1) // 2 for i in range(0, numel, fmt.block_size))
    )
    steps = unpack(list(message[codes_at : codes_at + count]), numel, fmt)
    return steps * oracle.expand(scale, steps.shape, "block", fmt.block_size)


def lay_out(rng, numels, fmt, *, lengths=None):
    """(Parts, message_bytes) of pieces at random places of tensors and of a message, with gaps.

    `lengths` of the tensors; without it there is one, which the pieces fill.
    """
    numels = np.array(numels, dtype=np.int64)
    if lengths is None:
        source, start = np.zeros_like(numels), np.cumsum(numels) - numels
    else:
        source = rng.integers(len(lengths), size=len(numels))
        start = np.array([rng.integers(lengths[s] - n + 1) for s, n in zip(source, numels, strict=True)])
    scale_at, codes_at, end = np.zeros_like(numels), np.zeros_like(numels), int(rng.integers(9))
    for piece in rng.permutation(len(numels)):
        numel = int(numels[piece])
        scale_at[piece] = -(-end // 4) * 4
        codes_at[piece] = scale_at[piece] + scale_bytes(numel, fmt) + int(rng.integers(6))
        end = codes_at[piece] + code_bytes(numel, fmt)
    stream = rng.integers(2**64, size=len(numels), dtype=np.uint64)
    return Parts(source, start.astype(np.int64), numels, scale_at, codes_at, stream), int(end) + int(rng.integers(3))


def gradient(rng, length):
    """fp32 of many magnitudes, with blocks of zeros, of denormals, and with Inf and NaN here and there."""
    x = rng.normal(size=length) * 10.0 ** rng.uniform(-6, 3, size=length)
    for kind in range(6):
        begin = int(rng.integers(length))
        run = slice(begin, begin + int(rng.integers(1, 600)))
        if kind == 0:
            x[run] = 0.0
        elif kind == 1:
            x[run] = -0.0
        elif kind == 2:
            x[run] *= 1e-42
        elif kind == 3:
            x[run] *= 1e34
        elif length > 200:
            x[begin] = (np.inf, np.nan)[kind - 4]
    with np.errstate(over="ignore"):
        return x.astype(F)
