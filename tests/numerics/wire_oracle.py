"""The definition of ds_quant.numerics.wire once more, slow and for reading: numpy float32, block by block.

Shares no code with the implementation. Also lays out messages for tests.
"""

import numpy as np
from numerics import oracle

from ds_quant.numerics.wire import Parts, code_bytes, num_blocks

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
    if fmt.bits == 8:
        return np.array([byte - 256 if byte > 127 else byte for byte in packed])
    codes, at = [], 0
    for i in range(0, numel, fmt.block_size):
        length = min(fmt.block_size, numel - i)
        half = (length + 1) // 2
        block = [byte % 16 for byte in packed[at : at + half]] + [byte // 16 for byte in packed[at : at + half]]
        codes += [code - 16 if code > 7 else code for code in block[:length]]
        at += half
    return np.array(codes)


def encode(y, fmt, key, stream):
    """(codes, scale, code * scale) of a piece that is rotated already."""
    subkey = None if key is None else oracle.derive_key(key, stream)
    shape = {"granularity": "block", "block_size": fmt.block_size}
    codes, scale, _ = oracle.quantize(y, fmt.bits, symmetric=True, key=subkey, **shape)
    return codes, scale, codes.astype(F) * oracle.expand(scale, y.shape, **shape)


def decode(message, scale_at, codes_at, numel, fmt):
    """code * scale of a piece, from a bytes object."""
    blocks = -(-numel // fmt.block_size)
    scale = np.frombuffer(message[scale_at : scale_at + 4 * blocks], dtype=F)
    count = (
        numel
        if fmt.bits == 8
        else sum((min(fmt.block_size, numel - i) + 1) // 2 for i in range(0, numel, fmt.block_size))
    )
    codes = unpack(list(message[codes_at : codes_at + count]), numel, fmt)
    return codes.astype(F) * oracle.expand(scale, codes.shape, "block", fmt.block_size)


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
        codes_at[piece] = scale_at[piece] + 4 * num_blocks(numel, fmt) + int(rng.integers(6))
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
