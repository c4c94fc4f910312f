"""Codes in memory: one to a byte where they have 8 bits, else packed in planes.

A code of b bits is cut into planes of 4, 2 and 1 bits, as b is a sum of them, the widest at its low end: 6 bits are a
plane of 4 below one of 2. Packed codes are uint8. Within a block of n elements, a plane of w bits puts k = 8 / w
elements into a byte: with h = ceil(n / k), byte j holds element j in its lowest w bits, element j + h in the next w,
and so on, for j = 0 to h - 1; what lies past the block's end is 0. The planes of a block follow one another, and a
block starts at a whole byte. A plane holds its bits of the code modulo 2^b.

4-bit codes are thus two to a byte, the first half of the block in the low halves; with an even block_size, numel
elements take ceil(numel / 2) bytes.
"""

import torch
from torch import Tensor

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
"""Widths of the planes of a code, from its low end, by bits."""


def code_bytes(numel: int, block_size: int, bits: int) -> int:
    """Bytes that the codes of `numel` elements take."""
    return numel if bits == 8 else packed_bytes(numel, block_size, bits)


def packed_bytes(numel: int, block_size: int, bits: int = 4) -> int:
    """Bytes of `numel` packed codes."""
    num_full, tail = divmod(numel, block_size)
    return sum(num_full * -(-block_size * width // 8) + -(-tail * width // 8) for width in PLANES[bits])


def pack(codes: Tensor, block_size: int, bits: int = 4) -> Tensor:
    """Codes of any integer dtype, one to an element of a 1-D tensor, as uint8 [packed_bytes]."""
    fields = codes.to(torch.int32) & ((1 << bits) - 1)
    covered = codes.numel() // block_size * block_size
    parts = [_pack_rows(fields[:covered].reshape(-1, block_size), bits)] if covered else []
    if covered < codes.numel() or not parts:
        parts.append(_pack_rows(fields[covered:].reshape(1, -1), bits))
    return torch.cat(parts)


def unpack(packed: Tensor, numel: int, block_size: int, *, signed: bool, bits: int = 4) -> Tensor:
    """The codes that `pack` was given: int8 from -2^(bits-1) on if signed, else uint8 from 0 on."""
    num_full = numel // block_size
    split = num_full * packed_bytes(block_size, block_size, bits)
    parts = [_unpack_rows(packed[:split].reshape(num_full, -1), block_size, bits)] if num_full else []
    if num_full * block_size < numel or not parts:
        parts.append(_unpack_rows(packed[split:].reshape(1, -1), numel - num_full * block_size, bits))
    fields = torch.cat(parts)
    middle = 1 << (bits - 1)
    return ((fields ^ middle) - middle).to(torch.int8) if signed else fields.to(torch.uint8)


def _pack_rows(fields: Tensor, bits: int) -> Tensor:
    """int32 codes of shape [rows, n], a block each -> uint8 of shape [rows * bytes of a block]."""
    planes, low_end = [], 0
    for width in PLANES[bits]:
        planes.append(_pack_plane((fields >> low_end) & ((1 << width) - 1), width))
        low_end += width
    return torch.cat(planes, dim=1).to(torch.uint8).reshape(-1)


def _pack_plane(fields: Tensor, width: int) -> Tensor:
    """int32 of shape [rows, n] -> int32 bytes of shape [rows, ceil(n * width / 8)]."""
    num_bytes = -(-fields.shape[1] * width // 8)
    packed = fields[:, :num_bytes]
    for number in range(1, 8 // width):
        part = fields[:, number * num_bytes : (number + 1) * num_bytes]
        if part.shape[1] < num_bytes:
            part = torch.nn.functional.pad(part, (0, num_bytes - part.shape[1]))
        packed = packed | part << (number * width)
    return packed


def _unpack_rows(packed: Tensor, length: int, bits: int) -> Tensor:
    """uint8 of shape [rows, bytes of a block] -> int32 codes of shape [rows * length]."""
    packed = packed.to(torch.int32)
    codes: Tensor | None = None
    start = low_end = 0
    for width in PLANES[bits]:
        num_bytes = -(-length * width // 8)
        plane = packed[:, start : start + num_bytes]
        mask = (1 << width) - 1
        parts = [(plane >> (number * width)) & mask for number in range(8 // width)]
        fields = torch.cat(parts, dim=1)[:, :length] << low_end
        codes = fields if codes is None else codes | fields
        start, low_end = start + num_bytes, low_end + width
    assert codes is not None
    return codes.reshape(-1)
