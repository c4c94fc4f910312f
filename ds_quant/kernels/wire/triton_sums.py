"""Adds the messages of any number of ranks to a sum in one launch: Triton. Nobody has run it on a GPU yet.

The kernel loops over the messages and adds in the order of the ranks, with no product fused into a sum, so that its
sums have the bits of the same loop in torch; the tests show so in Triton's interpreter. It reads each code once, and
the sum is read and written once. A program takes as many rows as make TILE elements.

Messages may begin at any address: scales are read byte by byte, four bytes of a block's 20 or more.
"""

# What a Triton function is passed has no type that mypy knows.
# mypy: disallow-incomplete-defs=False

import triton
import triton.language as tl
from torch import Tensor

from ds_quant.kernels.launching import Launch, ceil_div, run
from ds_quant.kernels.wire.places import Places
from ds_quant.numerics.wire import WireFormat

TILE = 1024
"""Elements of a program, where its blocks are not larger."""
ELEMENTS_PER_WARP = 256


def add_messages(fmt: WireFormat, places: Places, received: Tensor, first: int, last: int, total: Tensor) -> None:
    """`compiled.add_messages`."""
    if first < last:
        run(launch(fmt, places, received, first, last, total), total.device)


def launch(fmt: WireFormat, places: Places, received: Tensor, first: int, last: int, total: Tensor) -> Launch:
    """The one launch of `add_messages`."""
    num_rows, block_size = total.shape
    rows = max(TILE // block_size, 1)
    is_short = places.tail is not None
    tail = places.offset if places.tail is None else places.tail
    columns = (places.piece, places.scale_at, places.codes_at, places.offset, tail)
    numbers = (num_rows, first, last, received.shape[1])
    options = {"num_warps": max(rows * block_size // ELEMENTS_PER_WARP, 1), "enable_fp_fusion": False}
    return Launch(
        kernel,
        (ceil_div(num_rows, rows),),
        (total, received, *columns, *numbers, fmt.bits, block_size, rows, is_short),
        options,
    )


@triton.jit
def _value(message, scale_at, at, shift, valid, inside, BITS: tl.constexpr):
    """code * scale of a tile [rows, block]; 0 where there is no element."""
    bits = tl.load(message + scale_at, mask=valid, other=0).to(tl.int32)
    bits |= tl.load(message + scale_at + 1, mask=valid, other=0).to(tl.int32) << 8
    bits |= tl.load(message + scale_at + 2, mask=valid, other=0).to(tl.int32) << 16
    bits |= tl.load(message + scale_at + 3, mask=valid, other=0).to(tl.int32) << 24
    scale = bits.to(tl.float32, bitcast=True)
    code = tl.load(message + at, mask=inside, other=0).to(tl.int32)
    if BITS == 4:
        code = (code >> shift) & 15
    code = (code ^ (1 << (BITS - 1))) - (1 << (BITS - 1))
    return code.to(tl.float32) * scale


@triton.jit(do_not_specialize=["num_rows", "first", "last", "message_bytes"])
def kernel(
    sums, received, pieces, scales, codes, offsets, tails,
    num_rows, first, last, message_bytes,
    BITS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, IS_SHORT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    valid = row < num_rows
    piece = tl.load(pieces + row, mask=valid, other=0)
    offset = tl.load(offsets + piece, mask=valid, other=0)
    if IS_SHORT:
        number = offset
        length = tl.load(tails + piece, mask=valid, other=0)
        inside = lane < length
        half = (length + 1) >> 1
    else:
        number = row - offset
        inside = valid & (lane < BLOCK)
        half = BLOCK // 2
    scale_at = tl.load(scales + piece, mask=valid, other=0) + 4 * number
    at = tl.load(codes + piece, mask=valid, other=0) + number * (BLOCK * BITS // 8)
    shift = 0
    if BITS == 8:
        at = at + lane
    else:
        shift = tl.where(lane < half, 0, 4)
        at = at + tl.where(lane < half, lane, lane - half)

    place = sums + row.to(tl.int64) * BLOCK + lane
    total = tl.load(place, mask=inside, other=0.0)
    message = received + first.to(tl.int64) * message_bytes
    for _ in range(first, last):
        total += _value(message, scale_at, at, shift, valid, inside, BITS)
        message += message_bytes
    tl.store(place, total, mask=inside)
