"""Gradients on the wire, all blocks of a call at once: what `compiled` compiles.

The definition of `numerics.wire` for a matrix [num_rows, block_size] whose rows are blocks of any pieces: either all
whole, or all shorter and filled up with zeros. Rows say where their elements and codes lie; what is written beyond a
row's length is written to its last place once more, with the same value.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ds_quant.kernels.wire.places import Places
from ds_quant.numerics import integer, rotation
from ds_quant.numerics.random import bits_at
from ds_quant.numerics.wire import WireFormat


class Rows(NamedTuple):
    """Blocks of a call: int64 [num_rows, 1] each."""

    element: Tensor
    """First element, in the flat tensor."""
    scale_at: Tensor
    codes_at: Tensor
    length: Tensor | None
    """Number of elements; None: all are whole."""
    first: Tensor
    """First element, in the piece."""
    key: Tensor | None
    """The words of the pieces' keys, [2, num_rows, 1]."""


AT_ONCE = 4
"""Messages that one call adds: more of them compile for longer, fewer take more calls."""


class Settings(NamedTuple):
    """What a compiled function is made for."""

    fmt: WireFormat
    stochastic: bool = False
    with_errors: bool = False


def quantize_rows(
    settings: Settings,
    places: Places,
    words: Tensor | None,
    flat: Tensor,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    message: Tensor,
    written: Tensor | None,
    inverse: Tensor,
) -> Tensor | None:
    rows = _rows(settings.fmt, places, words)
    y = _own_rows(settings.fmt, rows, flat, residual, residual_scale)
    return _send_rows(settings, rows, y, message, written, inverse)


def add_own(
    settings: Settings,
    places: Places,
    flat: Tensor,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    total: Tensor,
) -> None:
    """Add the own pieces to `total`, fp32 [num_rows, block_size]."""
    total.add_(_own_rows(settings.fmt, _rows(settings.fmt, places), flat, residual, residual_scale))


def add_others(
    settings: Settings, places: Places, received: Tensor, begin: Tensor, step: Tensor, count: Tensor, total: Tensor
) -> None:
    """Add the values of `count` messages to `total`, one after the other; at most AT_ONCE.

    received: all messages, one after the other. begin: where the first of these begins. step: bytes from one to the
    next. For those that are missing up to AT_ONCE zeros are added, which change nothing: a sum that begins with 0.0 is
    never -0.0. Numbers are int64 tensors: others would be compiled in, as would where a view of a message begins.
    """
    rows = _rows(settings.fmt, places)
    added = total
    for number in range(AT_ONCE):
        at = begin + step * (count - 1).clamp(max=number)
        added = added + torch.where(count > number, _values(received, rows, settings.fmt, at), 0.0)
    total.copy_(added)


def total_to_message(
    settings: Settings,
    places: Places,
    words: Tensor | None,
    total: Tensor,
    factor: Tensor,
    message: Tensor,
    written: Tensor | None,
    inverse: Tensor,
) -> Tensor | None:
    rows = _rows(settings.fmt, places, words)
    return _send_rows(settings, rows, _multiplied(settings, rows, total, factor), message, written, inverse)


def total_to_output(settings: Settings, places: Places, total: Tensor, factor: Tensor, output: Tensor) -> None:
    rows = _rows(settings.fmt, places)
    _put(output, rows, _unrotate(_multiplied(settings, rows, total, factor), rows, settings.fmt))


def dequantize_rows(settings: Settings, places: Places, message: Tensor, flat: Tensor) -> None:
    rows = _rows(settings.fmt, places)
    _put(flat, rows, _unrotate(_values(message, rows, settings.fmt), rows, settings.fmt))


def _rows(fmt: WireFormat, places: Places, words: Tensor | None = None) -> Rows:
    """words: int64 [2, num_pieces], of the pieces' keys."""
    piece = places.piece
    number = places.offset[piece]
    if places.tail is None:
        number = torch.arange(len(piece), device=piece.device) - number
    first = number * fmt.block_size
    return Rows(
        (places.begin[piece] + first).unsqueeze(1),
        (places.scale_at[piece] + 4 * number).unsqueeze(1),
        (places.codes_at[piece] + first * fmt.bits // 8).unsqueeze(1),
        None if places.tail is None else places.tail[piece].unsqueeze(1),
        first.unsqueeze(1),
        None if words is None else words[:, piece].unsqueeze(2),
    )


def _lanes(rows: Rows, count: int, length: Tensor | None) -> Tensor:
    """0, 1, ... count - 1 for each row, [num_rows or 1, count]; from a shorter `length` on, its last one again."""
    lane = torch.arange(count, device=rows.element.device).unsqueeze(0)
    return lane if length is None else torch.minimum(lane, length - 1)


def _put(to: Tensor, rows: Rows, values: Tensor) -> None:
    lanes = _lanes(rows, values.shape[1], rows.length)
    if rows.length is not None:
        values = values.gather(1, lanes)
    to.index_put_((rows.element + lanes,), values.to(to.dtype))


def _own_rows(
    fmt: WireFormat, rows: Rows, flat: Tensor, residual: Tensor | None, residual_scale: Tensor | None
) -> Tensor:
    index = rows.element + _lanes(rows, fmt.block_size, rows.length)
    t = flat[index].float()
    if residual is not None and residual_scale is not None:
        t = t + residual[index].float() * residual_scale
    if fmt.rotation == "hadamard":
        t = _transform(t * rotation.block_signs(fmt.block_size, t.device), rows)
    return t if rows.length is None else torch.where(_is_filled(rows, fmt), t, 0.0)


def _is_filled(rows: Rows, fmt: WireFormat) -> Tensor:
    assert rows.length is not None
    return torch.arange(fmt.block_size, device=rows.element.device) < rows.length


def _unrotate(y: Tensor, rows: Rows, fmt: WireFormat) -> Tensor:
    if fmt.rotation != "hadamard":
        return y
    return _transform(y, rows) * rotation.block_signs(fmt.block_size, y.device)


def _transform(t: Tensor, rows: Rows) -> Tensor:
    if rows.length is None:
        return rotation.hadamard(t)
    # An element of a short block lies in the part of 2^k elements, where k is the highest bit that its index and the
    # length do not share. Parts of that size start at multiples of it: partners are found as in a whole block.
    size = t.shape[1]
    lane = torch.arange(size, device=t.device)
    differing = lane ^ rows.length
    factor = torch.ones_like(t)
    h = 1
    while h < size:
        partner = t[:, lane ^ h]
        turned = torch.where((lane & h) > 0, partner - t, t + partner)
        is_within = differing >= 2 * h
        t = torch.where(is_within, turned, t)
        factor = torch.where(is_within, rotation.norm(2 * h), factor)
        h *= 2
    return t * factor


def _send_rows(
    settings: Settings, rows: Rows, y: Tensor, message: Tensor, written: Tensor | None, inverse: Tensor
) -> Tensor | None:
    fmt = settings.fmt
    levels = 2 ** (fmt.bits - 1) - 1
    q = integer.quantize(y, fmt.bits, granularity="row")
    codes, scale = q.codes, q.scale
    if settings.stochastic:
        assert rows.key is not None
        steps = torch.where(scale > 0, integer.divide(y, scale.expand_as(y)), 0.0)
        index = rows.first + torch.arange(fmt.block_size, device=y.device)
        draws = (bits_at(rows.key, index) >> 8).float() * 2.0**-24
        floor = torch.floor(steps)
        codes = (floor + (draws < steps - floor)).clamp(-levels, levels).to(torch.int8)
    scale_index = rows.scale_at + torch.arange(4, device=y.device)
    # Of one dimension: Inductor may give a column any strides, and then it cannot be viewed as bytes.
    message.index_put_((scale_index.reshape(-1),), scale.reshape(-1).view(torch.uint8))
    _put_codes(message, rows, codes, fmt)
    lost = y - codes.float() * scale
    if written is not None:
        rounded = (_unrotate(lost, rows, fmt) * inverse).bfloat16()
        _put(written, rows, torch.where(rounded.isfinite(), rounded, 0.0))
    if not settings.with_errors:
        return None
    squares = torch.stack((lost, y)).double().square()
    return torch.where(scale.isfinite(), squares, 0.0).sum(dim=(1, 2))


def _half(rows: Rows, fmt: WireFormat) -> tuple[Tensor | int, Tensor]:
    """Of 4-bit codes, the number of bytes of each row, and these numbered, [num_rows or 1, block_size / 2]."""
    if rows.length is None:
        return fmt.block_size // 2, _lanes(rows, fmt.block_size // 2, None)
    half = (rows.length + 1) >> 1
    return half, _lanes(rows, fmt.block_size // 2, half)


def _put_codes(message: Tensor, rows: Rows, codes: Tensor, fmt: WireFormat) -> None:
    if fmt.bits == 8:
        lanes = _lanes(rows, fmt.block_size, rows.length)
        packed = (codes if rows.length is None else codes.gather(1, lanes)).view(torch.uint8)
    else:
        half, lanes = _half(rows, fmt)
        codes = codes.to(torch.int32) & 15
        if rows.length is None:
            low, high = codes.chunk(2, dim=1)
        else:
            # Filled up with zeros: so is the last high half of an odd length.
            low, high = codes.gather(1, lanes), codes.gather(1, (lanes + half).clamp(max=fmt.block_size - 1))
        packed = (low | high << 4).to(torch.uint8)
    message.index_put_((rows.codes_at + lanes,), packed)


def _values(message: Tensor, rows: Rows, fmt: WireFormat, at: Tensor | int = 0) -> Tensor:
    """code * scale, fp32 [num_rows, block_size]; what lies behind the end of a short row means nothing.

    at: where the message begins.
    """
    scale_index = at + rows.scale_at + torch.arange(4, device=message.device)
    scale = message[scale_index.reshape(-1)].view(torch.float32).unsqueeze(1)
    if fmt.bits == 8:
        codes = message[at + rows.codes_at + _lanes(rows, fmt.block_size, rows.length)].view(torch.int8)
        return codes.float() * scale
    half, lanes = _half(rows, fmt)
    packed = message[at + rows.codes_at + lanes].to(torch.int32)
    codes = torch.cat((packed & 15, packed >> 4), dim=1)
    if rows.length is not None:
        lane = torch.arange(fmt.block_size, device=message.device)
        # Upper halves follow the lower ones of a whole block, not of a short one.
        codes = codes.gather(
            1, torch.where(lane < half, lane, (lane - half + fmt.block_size // 2).clamp(max=fmt.block_size - 1))
        )
    return ((codes ^ 8) - 8).float() * scale


def _multiplied(settings: Settings, rows: Rows, total: Tensor, factor: Tensor) -> Tensor:
    total = total * factor
    return total if rows.length is None else torch.where(_is_filled(rows, settings.fmt), total, 0.0)
