"""Operands and results of int8 products on the CPU: hands them to C++, which has the reference's bits.

What `ops` checks is not checked again here. Functions are those of `numerics.products`, with `isa` to ask
for a narrower instruction set. They take torch.get_num_threads() threads and allocate, beside what they give, the
maxima of the columns for each thread where columns are quantized.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ds_quant.kernels import native
from ds_quant.kernels.int8 import cpu_parts, ops


class _Side(ctypes.Structure):
    """Side of products.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("factor", "codes", "scale")),
        ("key", ctypes.c_uint32 * 2),
        *((name, ctypes.c_int32) for name in ("stochastic", "one_scale")),
    )


class _QuantizeCall(ctypes.Structure):
    """QuantizeCall of products.h."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_rows", "num_columns", "row_stride")),
        *((name, _Side) for name in ("rows", "columns")),
        ("dtype", ctypes.c_int32),
        ("levels", ctypes.c_float),
    )


class _EpilogueCall(ctypes.Structure):
    """EpilogueCall of products.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("products", "others")),
        *((name, ctypes.c_int64) for name in ("num_rows", "num_columns", "row_stride")),
        *((name, ctypes.c_void_p) for name in ("row_scale", "column_scale", "bias", "result")),
        *((name, ctypes.c_int32) for name in ("one_row_scale", "one_column_scale", "bias_dtype", "dtype", "is_fp32")),
    )


class _DequantizeCall(ctypes.Structure):
    """DequantizeCall of products.h."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_rows", "num_columns", "row_stride")),
        *((name, ctypes.c_void_p) for name in ("row_scale", "column_scale", "result")),
        *((name, ctypes.c_int32) for name in ("one_scale", "dtype")),
    )


@ops.quantize_rows.by("cpu")
def quantize_rows(
    x: Tensor,
    levels: float,
    *,
    column_scale: Tensor | None = None,
    key: Tensor | None = None,
    isa: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`numerics.products.quantize_rows`."""
    rows = _Half(x, 0, column_scale, key)
    _quantize(x, levels, isa, rows=rows)
    return rows.codes, rows.scale


@ops.quantize_columns.by("cpu")
def quantize_columns(
    x: Tensor, levels: float, *, row_scale: Tensor | None = None, key: Tensor | None = None, isa: str | None = None
) -> tuple[Tensor, Tensor]:
    """`numerics.products.quantize_columns`."""
    columns = _Half(x, 1, row_scale, key)
    _quantize(x, levels, isa, columns=columns)
    return columns.codes, columns.scale


@ops.quantize_both.by("cpu")
def quantize_both(
    g: Tensor,
    levels: float,
    *,
    column_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    row_key: Tensor | None = None,
    column_key: Tensor | None = None,
    isa: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`numerics.products.quantize_both`."""
    rows, columns = _Half(g, 0, column_scale, row_key), _Half(g, 1, row_scale, column_key)
    _quantize(g, levels, isa, rows=rows, columns=columns)
    return rows.codes, rows.scale, columns.codes, columns.scale


@ops.quantize_tensor.by("cpu")
def quantize_tensor(
    x: Tensor, levels: float, *, key: Tensor | None = None, isa: str | None = None
) -> tuple[Tensor, Tensor]:
    """`numerics.products.quantize_tensor`."""
    rows = _Half(x, None, None, key)
    _quantize(x, levels, isa, rows=rows)
    return rows.codes, rows.scale


@ops.epilogue.by("cpu")
def epilogue(
    products: Tensor,
    *,
    others: Tensor | None = None,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype,
    out: Tensor | None = None,
    isa: str | None = None,
) -> Tensor:
    """`numerics.products.epilogue`."""
    chosen = native.isa_number("epilogue", isa)
    result = torch.empty(products.shape, dtype=dtype, device=products.device) if out is None else out
    if not result.numel():
        return result
    products = _readable(products)
    call = _EpilogueCall(
        *(products.data_ptr(), None if others is None else others.data_ptr()), *products.shape, products.stride(0)
    )
    call.is_fp32 = products.dtype == torch.float32
    call.result, call.dtype = result.data_ptr(), native.DTYPES[dtype]
    if row_scale is not None:
        row_scale = row_scale.detach().contiguous()
        call.row_scale, call.one_row_scale = row_scale.data_ptr(), row_scale.numel() == 1
    if column_scale is not None:
        column_scale = column_scale.detach().contiguous()
        call.column_scale, call.one_column_scale = column_scale.data_ptr(), column_scale.numel() == 1
    if bias is not None:
        bias = bias.detach().contiguous()
        call.bias, call.bias_dtype = bias.data_ptr(), native.DTYPES[bias.dtype]
    _function("epilogue", call.__class__)(call, isa=chosen)
    return result


@ops.dequantize.by("cpu")
def dequantize(
    codes: Tensor,
    *,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
    dtype: torch.dtype,
    isa: str | None = None,
) -> Tensor:
    """`numerics.products.dequantize`."""
    chosen = native.isa_number("dequantize", isa)
    result = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if not result.numel():
        return result
    codes = _readable(codes)
    given = row_scale if row_scale is not None else column_scale
    assert given is not None
    scale = given.detach().contiguous()
    call = _DequantizeCall(codes.data_ptr(), *codes.shape, codes.stride(0))
    if row_scale is not None:
        call.row_scale = scale.data_ptr()
    else:
        call.column_scale = scale.data_ptr()
    call.result, call.one_scale, call.dtype = result.data_ptr(), scale.numel() == 1, native.DTYPES[dtype]
    _function("dequantize", call.__class__)(call, isa=chosen)
    return result


@ops.scaled_matmul.by("cpu")
def scaled_matmul(
    a: Tensor,
    b: Tensor,
    *,
    row_scale: Tensor | None,
    column_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """torch multiplies, or exact products in fp32 where its int8 is slow: see `cpu_parts`."""
    if not (a.numel() and b.numel()):
        return ops.scaled_matmul.reference(a, b, row_scale=row_scale, column_scale=column_scale, bias=bias, dtype=dtype)
    finish = functools.partial(ops.epilogue, column_scale=column_scale, bias=bias, dtype=dtype)
    return cpu_parts.multiply(a, b, row_scale, finish)


class _Half:
    """What one side of a call writes, and what it holds on to until the call is over."""

    def __init__(self, x: Tensor, grouped: int | None, factor: Tensor | None, key: Tensor | None) -> None:
        """`grouped` is the dimension of x with a scale for each index; None for one scale in all."""
        num_scales = 1 if grouped is None else x.shape[grouped]
        self.codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
        self.scale = torch.empty(num_scales, dtype=torch.float32, device=x.device)
        self.side = _Side(codes=self.codes.data_ptr(), scale=self.scale.data_ptr(), one_scale=grouped is None)
        if factor is not None and grouped is not None:
            self.factor = factor.detach().reshape(-1).expand(x.shape[1 - grouped]).contiguous()
            self.side.factor = self.factor.data_ptr()
        if key is not None:
            self.side.stochastic, self.side.key = 1, tuple(key.tolist())


_NONE = _Side()


def _quantize(
    x: Tensor,
    levels: float,
    isa: str | None,
    *,
    rows: _Half | None = None,
    columns: _Half | None = None,
) -> None:
    chosen = native.isa_number("quantize", isa)
    if not x.numel():
        for half in (rows, columns):
            if half is not None:
                half.scale.zero_()
        return
    x = _readable(x.detach())
    call = _QuantizeCall(
        *(x.data_ptr(), *x.shape, x.stride(0)),
        *(_NONE if half is None else half.side for half in (rows, columns)),
        *(native.DTYPES[x.dtype], levels),
    )
    if _function("quantize", call.__class__)(call, isa=chosen):
        raise MemoryError("quantize: no memory for the maxima of the columns")


def _readable(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


@functools.cache
def _function(name: str, structure: type[ctypes.Structure]) -> Callable[..., Any]:
    name = f"ds_quant_products_{name}"
    result = ctypes.c_int if structure is _QuantizeCall else None
    sizes = {f"{name}_call_size": ctypes.sizeof(structure)}
    return native.function(name, ctypes.POINTER(structure), sizes=sizes, result=result)
