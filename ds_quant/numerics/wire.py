"""Gradients on the wire: the definition of what is sent, summed and read back. Slow, many temporaries, for reading.

A *piece* is a run of consecutive elements of one parameter's gradient. It is cut into blocks of `block_size` from its
first element; the last block may be shorter. Its *part* of a message is

    scales   from byte `scale_at` on, a multiple of 4: fp32, one a block; formats with a name as `wire_blocks` has them
    codes    from byte `codes_at` on, any number; 8 bits: int8, one byte an element; 4 bits: `packing.pack`

Blocks are quantized by `format.quantize_to`, integers thus by `integer.quantize` (granularity "block", symmetric):
levels 127 or 7, scale = max|y| / levels; zeros have scale 0; a block with an Inf or a NaN has scale NaN and codes 0. A
value is code * scale, where code is the value of the element: a product in fp32 with no clamp. y is the piece's
elements, rotated where the format says so (`rotation`). Stochastic rounding draws with
derive_key(key, stream), by the index of the element in its piece.

All arithmetic is fp32, whatever the dtype of the tensors; residuals are bf16. Pieces do not depend on each other.
With `read` and `write` the residuals of a piece (error feedback), each operation is, where a line is left out without
a residual:

    quantize     t = x + fl(read * scale);  y = rotate(t);  codes and scales of y into the message
                 write = bf16(fl(unrotate(fl(y - code * scale)) * inverse)), 0 where that is not finite
    reduce       y of the own piece as above;  acc = 0;  for each rank in order: acc = acc + (the own rank: y; else
                 code * scale from its message);  result = fl(acc * factor); then one of
                 output:   unrotate(result), rounded to output's dtype
                 message:  codes and scales of result into the message, at the same offsets as in what was received;
                           write = bf16(fl(unrotate(fl(result - code * scale)) * inverse)), 0 where not finite
    dequantize   unrotate(code * scale), rounded to the tensor's dtype

`errors`, where given, collects what quantizing costs: errors[0] += sum((y - code * scale)^2), errors[1] += sum(y^2),
over blocks with a finite scale, where y is what was quantized. Sums are taken in no order that callers may rely on.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ds_quant.numerics import integer, rotation
from ds_quant.numerics.random import derive_words
from ds_quant.numerics.wire_blocks import (
    WireFormat,
    code_bytes,
    num_blocks,
    scale_bytes,
    scales_from,
    to_bytes,
    values_from,
)

__all__ = [
    "Parts",
    "Residuals",
    "WireFormat",
    "code_bytes",
    "dequantize",
    "num_blocks",
    "quantize",
    "reduce",
    "scale_bytes",
]


class Parts(NamedTuple):
    """Pieces, and where their parts lie in a message: numpy arrays of one length, an entry a piece.

    The places of two pieces may not overlap where they are written to.
    """

    source: np.ndarray
    """int64: index into the tensors of the call."""
    start: np.ndarray
    """int64: first element within that tensor."""
    numel: np.ndarray
    """int64: number of elements, more than 0."""
    scale_at: np.ndarray
    """int64: byte offset of the scales, a multiple of 4."""
    codes_at: np.ndarray
    """int64: byte offset of the codes."""
    stream: np.ndarray
    """uint64: names the piece's random bits."""


class Residuals(NamedTuple):
    """Error feedback: what earlier messages left out, bf16 in the unit of the caller's choice. Entries are one a piece.

    A tensor is 1-D and contiguous, of the piece's elements; None leaves the piece without one.
    """

    read: Sequence[Tensor | None]
    write: Sequence[Tensor | None]
    """May be the tensors of `read`."""
    scale: float
    """What a residual is multiplied with before it is added; rounded to fp32."""
    inverse: float
    """What a new one is multiplied with before it is written; rounded to fp32."""


@torch.no_grad()
def quantize(
    tensors: Sequence[Tensor],
    parts: Parts,
    message: Tensor,
    fmt: WireFormat,
    *,
    key: tuple[int, int] | None = None,
    residuals: Residuals | None = None,
    errors: np.ndarray | Tensor | None = None,
) -> None:
    """Write the parts of the pieces of `tensors` into `message`, as the module docstring defines it.

    tensors: 1-D, contiguous, all fp32, bf16 or fp16. message: uint8, 1-D, contiguous. key: two words for stochastic
    rounding (see `fold_words`), None for nearest. errors: float64 of shape (2,).
    """
    for number, piece in enumerate(_pieces(parts)):
        y = _own(tensors, piece, number, fmt, residuals)
        _send(y, piece, number, message, fmt, key, residuals, errors)


@torch.no_grad()
def reduce(
    tensors: Sequence[Tensor],
    parts: Parts,
    received: Tensor,
    own_rank: int,
    fmt: WireFormat,
    *,
    factor: float = 1.0,
    output: Tensor | None = None,
    message: Tensor | None = None,
    key: tuple[int, int] | None = None,
    residuals: Residuals | None = None,
    errors: np.ndarray | Tensor | None = None,
) -> None:
    """Sum the own pieces and those of the other ranks, times `factor`, as the module docstring defines it.

    received: uint8 [world_size - 1, message_bytes], contiguous, in the order of the ranks without `own_rank`; each has
    the parts at the offsets of `parts`. The result goes to one of

    - `output`: 1-D, contiguous, fp32, bf16 or fp16, the pieces one after the other. Residuals are read, not written,
      and `errors` stays: nothing is quantized.
    - `message`: uint8, 1-D, contiguous, quantized with `key`, `residuals` and `errors` as `quantize` does.
    """
    written = 0
    for number, piece in enumerate(_pieces(parts)):
        own = _own(tensors, piece, number, fmt, residuals)
        others = [_values(row, piece, fmt) for row in received]
        result = torch.zeros_like(own)
        for y in (*others[:own_rank], own, *others[own_rank:]):
            result = result + y
        result = result * factor
        if output is not None:
            output[written : written + piece.numel] = _unrotate(result, fmt)
            written += piece.numel
        else:
            assert message is not None
            _send(result, piece, number, message, fmt, key, residuals, errors)


@torch.no_grad()
def dequantize(message: Tensor, parts: Parts, tensors: Sequence[Tensor], fmt: WireFormat) -> None:
    """Overwrite the pieces of `tensors` with what `message` holds for them, as the module docstring defines it.

    tensors and message as for `quantize`; other elements of the tensors stay.
    """
    for piece in _pieces(parts):
        values = _unrotate(_values(message, piece, fmt), fmt)
        tensors[piece.source][piece.start : piece.start + piece.numel] = values


class _Piece(NamedTuple):
    source: int
    start: int
    numel: int
    scale_at: int
    codes_at: int
    stream: int


def _pieces(parts: Parts) -> Iterator[_Piece]:
    return map(_Piece, *(column.tolist() for column in parts))


def _rotate(t: Tensor, fmt: WireFormat) -> Tensor:
    return rotation.rotate(t, fmt.block_size) if fmt.rotation == "hadamard" else t


def _unrotate(y: Tensor, fmt: WireFormat) -> Tensor:
    return rotation.unrotate(y, fmt.block_size) if fmt.rotation == "hadamard" else y


def _own(tensors: Sequence[Tensor], piece: _Piece, number: int, fmt: WireFormat, residuals: Residuals | None) -> Tensor:
    t = tensors[piece.source][piece.start : piece.start + piece.numel].float()
    residual = None if residuals is None else residuals.read[number]
    if residuals is not None and residual is not None:
        t = t + residual.float() * residuals.scale
    return _rotate(t, fmt)


def _send(
    y: Tensor,
    piece: _Piece,
    number: int,
    message: Tensor,
    fmt: WireFormat,
    key: tuple[int, int] | None,
    residuals: Residuals | None,
    errors: np.ndarray | Tensor | None,
) -> None:
    subkey = None if key is None else torch.tensor(derive_words(key, piece.stream), device=y.device)
    scales, codes = to_bytes(y, fmt, subkey)
    message[piece.scale_at : piece.scale_at + scales.numel()] = scales
    message[piece.codes_at : piece.codes_at + codes.numel()] = codes
    lost = y - values_from(scales, codes, piece.numel, fmt)
    if errors is not None:
        scale = integer.expand_groups(scales_from(scales, fmt), y, "block", fmt.block_size)
        squares = torch.where(scale.isfinite(), torch.stack((lost, y)).double().square(), 0.0).sum(dim=1)
        errors += squares if isinstance(errors, Tensor) else squares.cpu().numpy()
    residual = None if residuals is None else residuals.write[number]
    if residuals is not None and residual is not None:
        rounded = (_unrotate(lost, fmt) * residuals.inverse).bfloat16()
        residual.copy_(torch.where(rounded.isfinite(), rounded, 0.0))


def _values(message: Tensor, piece: _Piece, fmt: WireFormat) -> Tensor:
    """What a message holds for a piece, fp32 [numel], before it is rotated back."""
    scales = message[piece.scale_at : piece.scale_at + scale_bytes(piece.numel, fmt)]
    codes = message[piece.codes_at : piece.codes_at + code_bytes(piece.numel, fmt)]
    return values_from(scales, codes, piece.numel, fmt)
