"""Formats in floating point, and integers whose scales take 8 bits, on the CPU: C++ for what each element needs.

Scales are those of `numerics.format`, found by torch from the maxima of the groups: there are few of them. Functions
take torch.get_num_threads() threads; `isa` asks for a narrower instruction set.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ds_quant.kernels import native
from ds_quant.numerics.format import Format, Group, Integers, quantized_as, scale_of
from ds_quant.numerics.integer import Quantized
from ds_quant.numerics.minifloat import MINIFLOATS, Minifloat, decode


class _Scales(ctypes.Structure):
    """ScalesOfBlocks of formats.h."""

    _fields_ = (("values", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("columns_each", "row_stride")))


class _BlockMaximaCall(ctypes.Structure):
    """BlockMaximaCall of formats.h."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_rows", "num_columns", "row_stride", "block_size")),
        ("maxima", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
    )


class _EncodeCall(ctypes.Structure):
    """EncodeCall of formats.h."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_rows", "num_columns", "row_stride")),
        ("scales", _Scales),
        ("codes", ctypes.c_void_p),
        ("key", ctypes.c_uint32 * 2),
        *((name, ctypes.c_int32) for name in ("stochastic", "dtype", "levels")),
        *((name, ctypes.c_int32) for name in ("mantissa_bits", "smallest_exponent", "sign_bit", "nan")),
        ("largest", ctypes.c_float),
    )


class _DecodeCall(ctypes.Structure):
    """DecodeCall of formats.h."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_rows", "num_columns")),
        ("scales", _Scales),
        ("table", ctypes.c_void_p),
        *((name, ctypes.c_float) for name in ("shrink", "less")),
        ("result", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
    )


def quantize(x: Tensor, to: Format[Integers | Minifloat], key: Tensor | None, isa: str | None = None) -> Quantized:
    """`numerics.format.quantize_to` of x, a matrix with elements; not of asymmetric codes or the full range."""
    x = x.detach()
    x = x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
    scale = scale_of(x, _absmax(x, to.group, isa), to)
    return quantized_as(to, codes_by(x, scale, to, key, isa), scale)


def codes_by(
    x: Tensor, scale: Tensor, to: Format[Integers | Minifloat], key: Tensor | None, isa: str | None = None
) -> Tensor:
    """`numerics.format.codes_by` of a matrix with elements whose rows are contiguous."""
    elements, group, _ = to
    scale = scale.contiguous()
    result = torch.empty(x.shape, dtype=torch.int8 if isinstance(elements, Integers) else torch.uint8, device=x.device)
    call = _EncodeCall(x.data_ptr(), *x.shape, x.stride(0))
    call.scales = _scales(scale, x.shape[1], group.granularity, group.block_size)
    call.codes, call.dtype = result.data_ptr(), native.DTYPES[x.dtype]
    if key is not None:
        call.stochastic, call.key = 1, tuple(key.tolist())
    if isinstance(elements, Integers):
        call.levels = int(elements.levels)
    else:
        call.mantissa_bits, call.smallest_exponent = elements.mantissa_bits, elements.smallest_exponent
        call.sign_bit, call.nan, call.largest = elements.bits - 1, elements.nan or 0, elements.largest
    _run("encode", call, isa)
    return result


def dequantize(q: Quantized, dtype: torch.dtype, isa: str | None = None) -> Tensor:
    """`numerics.integer.dequantize` of a matrix with elements; not of asymmetric codes."""
    codes, scale = q.codes.contiguous(), q.scale.contiguous()
    result = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    table = _values(q.elements)
    call = _DecodeCall(codes.data_ptr(), *codes.shape)
    call.scales = _scales(scale, codes.shape[1], q.granularity, q.block_size)
    call.table, call.result, call.dtype = table.data_ptr(), result.data_ptr(), native.DTYPES[dtype]
    if q.elements == "integer":
        call.shrink, call.less = 1 - 2.0**-20, 1.0
    else:
        call.shrink = 1 - 2.0 ** -MINIFLOATS[q.elements].mantissa_bits
    _run("decode", call, isa)
    return result


def _absmax(x: Tensor, group: Group, isa: str | None) -> Tensor:
    """`reduce_groups` of the magnitudes."""
    if group.granularity == "column":
        return x.float().abs().amax(0)
    block_size = group.block_size if group.granularity == "block" else x.shape[1]
    result = torch.empty((x.shape[0], -(-x.shape[1] // block_size)), device=x.device)
    call = _BlockMaximaCall(x.data_ptr(), *x.shape, x.stride(0), block_size, result.data_ptr(), native.DTYPES[x.dtype])
    _run("block_maxima", call, isa)
    return result.amax() if group.granularity == "tensor" else result


def _scales(scale: Tensor, num_columns: int, granularity: str, block_size: int) -> _Scales:
    """Of a scale, contiguous: [] (tensor), [rows, 1] (row), [columns] (column) or [rows, blocks] (block)."""
    columns_each = {"column": 1, "block": block_size}.get(granularity, 0)
    row_stride = {"row": 1, "block": -(-num_columns // block_size)}.get(granularity, 0)
    return _Scales(scale.data_ptr(), columns_each, row_stride)


@functools.cache
def _values(elements: str) -> Tensor:
    """Of all codes, as bytes: fp32 [256]."""
    codes = torch.arange(256, dtype=torch.uint8)
    if elements == "integer":
        return codes.view(torch.int8).float()
    values = decode(codes & ((1 << MINIFLOATS[elements].bits) - 1), MINIFLOATS[elements])
    return values.contiguous()


def _run(name: str, call: ctypes.Structure, isa: str | None) -> None:
    chosen = native.isa_number(name, isa)
    _function(name, call.__class__)(ctypes.byref(call), isa=chosen)


@functools.cache
def _function(name: str, structure: type[ctypes.Structure]) -> Callable[..., Any]:
    name = f"ds_quant_formats_{name}"
    return native.function(name, ctypes.POINTER(structure), sizes={f"{name}_call_size": ctypes.sizeof(structure)})
