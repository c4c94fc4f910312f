"""Gradients on the wire, on the CPU: hands the pieces of a call to C++, which has the reference's bits.

What `ops` checks is not checked again here. Functions are those of `numerics.wire`, with `isa` to ask for a
narrower instruction set. They take torch.get_num_threads() threads and allocate some bytes a piece; the result does
not depend on the number of threads.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ds_quant.base.number_formats import FORMATS, FOUR_SIX
from ds_quant.kernels import native
from ds_quant.kernels.wire import ops
from ds_quant.numerics.wire import Parts, Residuals, WireFormat


class _Call(ctypes.Structure):
    """WireCall of wire.h."""

    _fields_ = (
        ("num_pieces", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("data", "numel", "scale_at", "codes_at", "stream", "read", "write")),
        *((name, ctypes.c_void_p) for name in ("result", "message", "received", "errors", "largest")),
        *((name, ctypes.c_int64) for name in ("message_bytes", "block_size")),
        *((name, ctypes.c_int32) for name in ("bits", "elements", "scale_kind", "scale_rule")),
        *((name, ctypes.c_int32) for name in ("rotated", "stochastic", "dtype", "result_dtype")),
        *((name, ctypes.c_int32) for name in ("num_ranks", "own_rank")),
        ("key", ctypes.c_uint32 * 2),
        *((name, ctypes.c_float) for name in ("factor", "residual_scale", "residual_inverse")),
    )


_QUANTIZE, _REDUCE, _DEQUANTIZE = range(3)
_ELEMENTS = {"e2m1": 1, "integer": 2}
_SCALE_KINDS = {"float": 0, "e8m0": 1, "e4m3": 2}
_SCALE_RULES = {"floor": 0, "up": 1, FOUR_SIX: 2}


@ops.quantize.by("cpu")
def quantize(
    tensors: Sequence[Tensor],
    parts: Parts,
    message: Tensor,
    fmt: WireFormat,
    *,
    key: tuple[int, int] | None = None,
    residuals: Residuals | None = None,
    errors: np.ndarray | None = None,
    isa: str | None = None,
) -> None:
    """`numerics.wire.quantize`."""
    _run(_QUANTIZE, isa, tensors, parts, fmt, residuals, message=message, key=key, errors=errors)


@ops.reduce.by("cpu")
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
    errors: np.ndarray | None = None,
    isa: str | None = None,
) -> None:
    """`numerics.wire.reduce`."""
    _run(
        *(_REDUCE, isa, tensors, parts, fmt, residuals),
        message=message,
        key=key,
        errors=errors,
        output=output,
        received=received,
        own_rank=own_rank,
        factor=factor,
    )


@ops.dequantize.by("cpu")
def dequantize(
    message: Tensor, parts: Parts, tensors: Sequence[Tensor], fmt: WireFormat, *, isa: str | None = None
) -> None:
    """`numerics.wire.dequantize`."""
    _run(_DEQUANTIZE, isa, tensors, parts, fmt, None, message=message)


@functools.cache
def _function() -> Callable[..., Any]:
    sizes = {"ds_quant_wire_call_size": ctypes.sizeof(_Call)}
    return native.function("ds_quant_wire", ctypes.POINTER(_Call), ctypes.c_int, sizes=sizes, result=ctypes.c_int)


def _run(
    operation: int,
    isa: str | None,
    tensors: Sequence[Tensor],
    parts: Parts,
    fmt: WireFormat,
    residuals: Residuals | None,
    *,
    message: Tensor | None,
    key: tuple[int, int] | None = None,
    errors: np.ndarray | None = None,
    output: Tensor | None = None,
    received: Tensor | None = None,
    own_rank: int = 0,
    factor: float = 1.0,
) -> None:
    if not len(parts.numel):
        return
    chosen = native.isa_number("wire", isa)
    dtype = tensors[0].dtype
    columns = [np.ascontiguousarray(column) for column in parts]  # kept alive until the call is over
    source, start, numel, scale_at, codes_at, stream = columns
    data = np.array([tensor.data_ptr() for tensor in tensors], dtype=np.int64)[source] + start * dtype.itemsize
    call = _Call(
        num_pieces=len(numel),
        data=data.ctypes.data,
        numel=numel.ctypes.data,
        scale_at=scale_at.ctypes.data,
        codes_at=codes_at.ctypes.data,
        stream=stream.ctypes.data,
        block_size=fmt.block_size,
        bits=fmt.bits,
        elements=_ELEMENTS[FORMATS[fmt.format].elements] if fmt.format else 0,
        scale_kind=_SCALE_KINDS[fmt.scale_kind],
        scale_rule=_SCALE_RULES[fmt.scale_rule],
        rotated=fmt.rotation == "hadamard",
        dtype=native.DTYPES[dtype],
    )
    if message is not None:
        call.message = message.data_ptr()
    if key is not None:
        call.stochastic, call.key = 1, key
    if residuals is not None:
        addresses = [
            np.array([0 if residual is None else residual.data_ptr() for residual in column], dtype=np.int64)
            for column in (residuals.read, residuals.write)
        ]
        call.read, call.write = (column.ctypes.data for column in addresses)
        call.residual_scale, call.residual_inverse = residuals.scale, residuals.inverse
    # The kernel adds to one array without gaps.
    sums = np.zeros(2)
    if errors is not None:
        call.errors = sums.ctypes.data
    if received is not None:
        call.received, call.message_bytes = received.data_ptr(), received.shape[1]
        call.num_ranks, call.own_rank, call.factor = received.shape[0] + 1, own_rank, factor
    if output is not None:
        result = output.data_ptr() + (np.cumsum(numel) - numel) * output.dtype.itemsize
        call.result, call.result_dtype = result.ctypes.data, native.DTYPES[output.dtype]
    if _function()(call, operation, isa=chosen):
        raise MemoryError("wire: no memory for the list of chunks")
    if errors is not None:
        errors += sums
